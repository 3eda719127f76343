"""The memory cap and the machine's memory: what would fit, said before a run, and the cap in force during one."""

from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import psutil
import torch

from common.errors import UserError
from common.memory import GB, estimate
from common.models.presets import OPT_SIZES, SIZES_BY_TYPE, model_shape, opt_shape
from common.parallel.configs import single_machine_configs
from common.parallel.slicing import slicing_fault
from common.utilisation import peak_resident_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
PRESETS = {"opt": (OPT_SIZES, opt_shape)} | {  # of a model type: its sizes, and a size's shape
    kind: (sizes, partial(model_shape, model_type=kind)) for kind, sizes in SIZES_BY_TYPE.items()
}


def refuse_above_cap(workload, expected, cap_gb, pretrained=False, configs=CONFIGS):
    """Raise where an estimate is above the cap, with one line that names what would fit.

    Args:
        workload: common.memory.Workload.
        expected: its MemoryEstimate.
        cap_gb: GB of 1e9 bytes per process; 0 or None: no cap.
        pretrained: whether the model's weights are given, so that no smaller model can be chosen.
        configs: folder of accelerate YAMLs to choose from.
    Raises:
        UserError: the estimate is above the cap.
    """
    if not cap_gb or expected.total <= cap_gb * GB:
        return
    smaller = [*_smaller_batches(workload), *_sharded(workload, Path(configs))]
    smaller += [] if pretrained else _smaller_models(workload)
    totals = ((estimate(changed, expected.libraries).total, flags) for changed, flags in smaller)
    raise UserError(
        f"the memory cap of {cap_gb:g} GB is too small: a process needs about {expected.total / GB:.2f} GB for "
        f"{workload.rows} rows of {workload.seq_length} tokens; "
        + _remedy(totals, cap_gb * GB, expected.total, "raise it to")
    )


def refuse_above_memory(workload, expected, machines=1, pretrained=False, memory=None):
    """Raise where processes on CPUs would need more than their machine has, with one line that names what would fit.

    Without it the system kills one of them when they are that far.

    Args:
        workload, expected, pretrained: as refuse_above_cap.
        machines: that share the processes.
        memory: bytes of a machine; None: of this one, with its swap.
    Raises:
        UserError: the estimates of a machine's processes are above its memory.
    """
    memory = memory or psutil.virtual_memory().total + psutil.swap_memory().total
    needed = expected.total * workload.processes // machines
    if workload.device != "cpu" or needed <= memory:
        return
    smaller = [*_smaller_batches(workload), *_fewer_processes(workload)]
    smaller += [] if pretrained else _smaller_models(workload)
    totals = (
        (estimate(changed, expected.libraries).total * changed.processes // machines, flags)
        for changed, flags in smaller
    )
    here = max(1, workload.processes // machines)  # stages of a pipeline are not counted
    raise UserError(
        f"this machine has {memory / GB:.2f} GB of memory, and {here} process(es) on it need about "
        f"{needed / GB:.2f} GB for {workload.rows} rows of {workload.seq_length} tokens each; "
        + _remedy(totals, memory, needed, "take one with")
    )


def _remedy(totals, limit, most, otherwise):
    """What would fit, in words.

    Args:
        totals: what to try, in this order: (bytes, flags); limit: bytes that they may take; most: bytes that are too
            many; otherwise: what to do where nothing fits, before a number of GB.
    """
    least = (most, "")
    for total, flags in totals:
        if total <= limit:
            return f"{flags} would fit ({total / GB:.2f} GB)"
        least = min(least, (total, f", which takes {flags}"), key=itemgetter(0))
    return f"{otherwise} {least[0] / GB:.2f} GB at least{least[1]}"


def _smaller_batches(workload):
    """Fewer rows at once, checkpointing, both: (Workload, the flags that make it)."""
    checkpointed = replace(workload, gradient_checkpointing=True)
    flag = "" if workload.gradient_checkpointing else " --gradient_checkpointing"
    halves = [workload.rows >> n for n in range(1, workload.rows.bit_length())]
    for rows in halves:
        yield replace(workload, rows=rows), f"--per_device_train_batch_size {rows}"
    if flag:
        yield checkpointed, flag.strip()
        for rows in halves:
            yield replace(checkpointed, rows=rows), f"--per_device_train_batch_size {rows}{flag}"


def _least(workload):
    """The smallest batch with checkpointing: (Workload, the flags that make it)."""
    flag = "" if workload.gradient_checkpointing else " --gradient_checkpointing"
    return replace(workload, rows=1, gradient_checkpointing=True), f" --per_device_train_batch_size 1{flag}"


def _sharded(workload, configs):
    """The YAMLs that cut something, as it is and with the smallest batch: (Workload, the launch that makes it)."""
    least, flags = _least(workload)
    for path, strategy in single_machine_configs(configs):
        whole = strategy["strategy"] == "ddp" and strategy["slices"] == 1
        if whole or slicing_fault(workload.config, strategy["slices"]):
            continue
        launch = f"accelerate launch --config_file {path}"
        yield replace(workload, **strategy), launch
        yield replace(least, **strategy), f"{launch} with{flags}"


def _fewer_processes(workload):
    """Fewer processes, with their rows and with the smallest batch: (Workload, the flags that make it)."""
    for base, more in ((workload, ""), _least(workload)):
        halves = (workload.ranks >> n for n in range(1, workload.ranks.bit_length()))
        for ranks in halves if workload.replicas == 1 else ():
            fewer = replace(base, ranks=ranks)
            yield fewer, f"--num_processes {fewer.processes}{more}"


def _smaller_models(workload):
    """The smaller presets, as it is and with the smallest batch: (Workload, the flags that make it)."""
    for base, more in ((workload, ""), _least(workload)):
        for size, config in _smaller_presets(workload.config):
            if not slicing_fault(config, base.slices):
                yield replace(base, config=config), f"--model_size {size}{more}"


def _smaller_presets(config):
    """The presets of this model's type that are smaller than it, the largest first: (size, configuration)."""
    sizes, shape_of = PRESETS.get(config.model_type, ({}, None))
    for size, (layers, hidden, *_) in sorted(sizes.items(), key=_matrices, reverse=True):
        if layers * hidden**2 < config.num_hidden_layers * config.hidden_size**2:
            values = config.to_dict() | shape_of(size) | {"vocab_size": config.vocab_size}
            values.pop("layer_types", None)  # which follow from their number
            yield size, type(config).from_dict(values)


def _matrices(item):
    _, (layers, hidden, *_) = item
    return layers * hidden**2


def set_memory_cap(cap_gb, device):
    """Put a cap in force: on a GPU in the allocator, on a CPU by a look at the process's memory after each step.

    Args:
        cap_gb: GB of 1e9 bytes per process; 0 or None: no cap.
        device: torch.device.
    Returns:
        function without arguments, to be called once in a step, which raises UserError when a process on a CPU has
        held more than the cap; None where there is nothing to look at.
    """
    if cap_gb and device.type == "cuda":  # what is above it raises the allocator's own error
        capacity = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * GB / capacity), device)
    return partial(_check, cap_gb) if cap_gb and device.type == "cpu" else None


def _check(cap_gb):
    peak = peak_resident_bytes()
    if peak > cap_gb * GB:
        raise UserError(
            f"the process has held {peak / GB:.2f} GB, above the memory cap of {cap_gb:g} GB: halve "
            "--per_device_train_batch_size, add --gradient_checkpointing, or raise the cap"
        )
