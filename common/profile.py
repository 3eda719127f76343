"""Short measurements of this machine for the pipeline planner: layers, sends, memory."""

import os
import time
from dataclasses import replace
from statistics import median

import psutil
import torch

from common.hardware import AUTOCAST, has_bf16
from common.hardware_table import Hardware
from common.memory import GB
from common.models.footprint import ready_step
from common.parallel.bandwidth import send_bandwidth
from common.pipeline_plan import layer_flops

ROWS, TIMES = (1, 2, 4), 5
FEW, MORE = 1, 3  # layers: their difference leaves out what is before and behind


def profile(workload):
    """Measure a layer of a model forward and backward for several micro-batches, the sends, and the memory.

    Args:
        workload: common.memory.Workload; its configuration, length and head are what is measured.
    Returns:
        Hardware; on a CPU a device is a core. `near` is None where there is one device, `far` always.
    """
    gpus, devices = torch.cuda.is_available(), devices_here()
    device = torch.device("cuda" if gpus else "cpu")
    precision = "bf16" if has_bf16(device.type) else "fp32"
    threads = torch.get_num_threads()
    if not gpus:
        torch.set_num_threads(1)
    forward, backward = zip(*(layer_seconds(workload, device, precision, rows) for rows in ROWS), strict=True)
    torch.set_num_threads(threads)
    slope, overhead = fitted_line(ROWS, forward)
    memory = torch.cuda.get_device_properties(device).total_memory if gpus else psutil.virtual_memory().total / devices
    return Hardware(
        devices_per_machine=devices,
        memory=memory / GB,
        flops=layer_flops(workload, workload.footprint()) / slope,
        layer_overhead=overhead,
        backward_ratio=sum(backward) / sum(forward),
        near=send_bandwidth(device.type) if devices > 1 else None,
        precision=precision,
    )


def devices_here():
    """How many devices this machine has: GPUs, or cores of a CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def layer_seconds(workload, device, precision, rows):
    """Seconds of one layer of a model, (forward, backward): the median of several passes, after one to warm up."""
    of_few, of_more = (
        _pass_seconds(_with_layers(workload, layers), device, precision, rows) for layers in (FEW, MORE)
    )
    return [max((more - few) / (MORE - FEW), 1e-9) for few, more in zip(of_few, of_more, strict=True)]


def fitted_line(xs, ys):
    """Least squares with an intercept that is not negative. Returns: (slope, intercept)."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    if 0 <= slope * mean_x <= mean_y:
        return slope, mean_y - slope * mean_x
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs), 0.0


def loss_of(output):
    """A number whose gradient reaches every layer, of what ready_step()'s function returns."""
    of_model = output[0]
    return (
        of_model if of_model.dim() == 0 else of_model[..., 0].float().mean()
    )  # a mean over all of a norm is constant


def _with_layers(workload, layers):
    config = workload.config.__class__.from_dict(workload.config.to_dict() | {"num_hidden_layers": layers})
    return replace(workload, config=config)


def _pass_seconds(workload, device, precision, rows):
    shape = (workload.head, workload.targets, workload.packed, workload.attention)
    with torch.device(device):
        model, run = ready_step(workload.config, workload.seq_length, *shape)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    seconds = []
    for _ in range(1 + TIMES):
        synchronize()
        began = time.perf_counter()
        with torch.device(device), autocast:
            loss = loss_of(run(rows))
        synchronize()
        between = time.perf_counter()
        loss.backward()
        synchronize()
        seconds.append((between - began, time.perf_counter() - between))
        model.zero_grad()
    return [median(column) for column in zip(*seconds[1:], strict=True)]
