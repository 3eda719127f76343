"""How fast two processes of this machine send to each other."""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from common.memory import GB

SENT_BYTES, TIMES = 1 << 24, 9  # as much as a micro-batch's activations; a median


def send_bandwidth(device_type):
    """Measure it: gloo between two processes on a CPU, NCCL between two GPUs.

    Args:
        device_type: "cpu" or "cuda".
    Returns:
        GB/s (1e9 bytes), one way.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_measure, (device_type, folder), nprocs=2)
        return float(Path(folder, "bandwidth").read_text())


def _measure(rank, device_type, folder):
    """There and back, several times; rank 0 writes down what it sees."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    backend, synchronize = "gloo", lambda: None
    if device_type == "cuda":
        torch.cuda.set_device(device)
        backend, synchronize = "nccl", torch.cuda.synchronize
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tensor, seconds = torch.zeros(SENT_BYTES, dtype=torch.uint8, device=device), []
    for _ in range(1 + TIMES):  # the first connects
        began = time.perf_counter()
        for turn in range(2):
            dist.send(tensor, 1 - rank) if turn == rank else dist.recv(tensor, 1 - rank)
        synchronize()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        Path(folder, "bandwidth").write_text(str(2 * SENT_BYTES / median(seconds[1:]) / GB))
    dist.destroy_process_group()
