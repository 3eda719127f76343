"""What Colossal-AI takes from CUDA, for a machine without it: the smallest substitutes under which the rest runs.

The device and the host are the same memory here; what Colossal-AI would hold on the device is marked by a device of
index 0, cpu:0, and a move changes the mark. Its chunks, their order, their gathering and reducing, its optimizer and
its bookkeeping of memory are its own. What is not: the moves themselves, streams, pinned memory, the compiled Adam.
"""

import contextlib
import os
import types

import psutil
import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.nn.optimizer import CPUAdam
from colossalai.zero.gemini.chunk import chunk as chunk_module
from colossalai.zero.gemini.chunk import manager as manager_module

DEVICE = torch.device("cpu", 0)


def substitute():
    """Put the substitutes in place, in this process."""
    set_accelerator(HostAccelerator())
    CPUAdamLoader.register_extension(HostKernel)
    chunk_module.Chunk = manager_module.Chunk = HostChunk


def host_share():
    """Bytes of the host's memory for each of its processes."""
    return psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class HostAccelerator(CpuAccelerator):
    """The processor under CUDA's name, which low-level ZeRO asks for; nothing there runs beside anything else."""

    def __init__(self):
        super().__init__()
        self._name = "cuda"

    def get_current_device(self):
        """What counts as the device's memory."""
        return DEVICE

    def device_count(self):
        """The processor."""
        return 1

    def synchronize(self, device=None):
        """All is done already."""

    def Stream(self, *_, **__):
        """As current_stream."""
        return self.current_stream()

    def current_stream(self, device=None):
        """Something to wait for, which is done already."""
        return types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    def stream(self, stream):
        """A context that changes nothing."""
        return contextlib.nullcontext()


class HostKernel:
    """In the place of the compiled Adam, whose loader wants CUDA."""

    name, priority = "host", 0

    def is_available(self):
        """Always."""
        return True

    def assert_compatible(self):
        """It is."""

    def load(self):
        """What has the compiled module's optimizer."""
        return types.SimpleNamespace(CPUAdamOptimizer=HostAdam)


class HostAdam:
    """The compiled Adam's call, of gradients in fp16, for Colossal-AI's own update in torch."""

    def __init__(self, *settings):
        self.decoupled = settings[-1]

    def step(self, step, rate, beta1, beta2, eps, decay, corrects, data, grad, first, second, div_scale):
        """Update data and its two moments in place."""
        grad = grad.to(data.dtype) / (1 if div_scale == -1 else div_scale)
        corrections = 1 - beta1**step, 1 - beta2**step
        CPUAdam.torch_adam_update(
            self, data, grad, first, second, rate, beta1, beta2, eps, decay, *corrections, self.decoupled
        )


class HostChunk(chunk_module.Chunk):
    """A chunk whose shard on the device and shard on the host are the same memory."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"pin_memory": False})

    def close_chunk(self):
        """As Chunk's."""
        to_host = self.shard_device.index is None
        self.shard_device = DEVICE  # of type cpu, too, whence Chunk's moves it to the host
        super().close_chunk()
        if not (to_host or self.keep_gathered):
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None

    def shard_move(self, device, force_copy=False, non_blocking=False):
        """As Chunk's."""
        assert not self.is_gathered
        if not self.optim_sync_flag:  # its numbers are those of the fp32 chunk
            self._Chunk__paired_shard_move()
            self.optim_sync_flag = True
        elif device.index is not None and self.cuda_shard is None:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None
        elif device.index is None and self.cuda_shard is not None:
            self.cuda_shard, self.cpu_shard, self.cpu_vis_flag = None, self.cuda_shard, True


class HostMonitor:
    """In the place of CUDA's count of allocated memory: what Gemini's chunks hold on the device, and nothing else.

    Args:
        chunk_manager: of Gemini.
    """

    def __init__(self, chunk_manager):
        self.chunk_manager = chunk_manager

    def start(self):
        """Begin a period."""

    def finish(self):
        """Bytes at the end of the period."""
        return self.chunk_manager.total_mem["cuda"]
