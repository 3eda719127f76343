"""Turns the YAML in force into a working accelerator; the only folder that knows how processes talk to each other."""

import hashlib
import importlib.util
import os
import shutil
import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin

from common.errors import UserError, limit_reached
from common.hardware import has_bf16

# What the first word of a YAML's `role` may be; accelerate's own strategies leave torchrun's "default".
ROLES = ("default", "cpu")


def make_accelerator(precision=None, tracker="none"):
    """Build the accelerator that the launcher asked for, and refuse one that differs from what it asked.

    Args:
        precision: "bf16", "fp16", "no" or None; what the command line asks for. It must agree with a launcher's.
        tracker: "none", or a name that accelerate knows; start_tracker starts it.
    Returns:
        accelerate.Accelerator; gradient accumulation is set later (`accelerator.gradient_accumulation_steps`).
    Raises:
        UserError: processes that do not see each other, an unknown role, contradicting or impossible precision, a
            tracker that is not installed.
    """
    role = check_launch(precision, tracker)
    world = launched_processes()
    if world == 1:  # a group of one is no group: nothing to wrap, nothing to wait for
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    # Set by accelerate for its one-process launcher, and inherited by accident otherwise, where it would change
    # the strategy in silence; what it says is passed on as an argument instead.
    asked_cpu = os.environ.pop("ACCELERATE_USE_CPU", "false").lower() == "true"
    cpu = role == "cpu" or asked_cpu or not torch.cuda.is_available()
    # torch's newer name for this argument is not one of accelerate's yet
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # should something import DeepSpeed
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_resolve_precision(precision, cpu),
            log_with=None if tracker == "none" else tracker,
            project_dir=".",  # start_tracker gives the real one, which takes the processes to agree on
            step_scheduler_with_optimizer=False,  # the schedule follows the budget, not the number of processes
            # an endless stream has no end of an epoch at which a half-full accumulation would have to be flushed
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise UserError(
            f"accelerate cannot start {world} process(es): {error}; launch with accelerate launch"
        ) from error
    if accelerator.num_processes != world:
        raise UserError(
            f"the launcher started {world} processes but this one sees {accelerator.num_processes}: "
            "launch with accelerate_configs/cpu.yaml or accelerate_configs/ddp.yaml"
        )
    return accelerator


def check_launch(precision, tracker, compiled=False):
    """Judge what the launcher and the command line ask for, without starting anything.

    Args:
        precision, tracker: as make_accelerator; compiled: whether the model is to be compiled.
    Returns:
        str: the role that the YAML gives, "default" where it gives none.
    Raises:
        UserError: as make_accelerator.
    """
    if tracker != "none" and not importlib.util.find_spec(tracker):
        raise UserError(f"--report_to {tracker}: its package is missing; pip install {tracker}, or drop the flag")
    words = os.environ.get("ROLE_NAME", "").split() or ["default"]
    if words[0] not in ROLES or len(words) > 1:
        raise UserError(f"the YAML's role '{' '.join(words)}' is unknown: known roles are {', '.join(ROLES)}")
    on_cpu = words[0] == "cpu" or not torch.cuda.is_available()
    _resolve_precision(precision, on_cpu)
    if compiled and on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--torch_compile needs a C++ compiler on a CPU: install g++, or drop the flag")
    return words[0]


def launched_processes():
    """How many processes the launcher says there are."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdigit() or int(world) < 1:
        raise UserError(f"WORLD_SIZE is '{world}' in the environment: unset it, or start with accelerate launch")
    return int(world)


def describe(accelerator):
    """What is in force, for the line printed at start and for all_results.json.

    Returns:
        dict: strategy, world_size, precision ("fp32" where nothing is mixed), device.
    """
    strategy = "single process" if accelerator.num_processes == 1 else "data parallel (DDP)"
    threads = f" ({torch.get_num_threads()} threads)" if accelerator.device.type == "cpu" else ""
    name = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "cpu"
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and not has_bf16("cpu")
    if slow:
        threads += "; it has no bf16 and emulates it, tens of times slower: give --mixed_precision no, or --fp32"
    return {
        "strategy": strategy,
        "world_size": accelerator.num_processes,
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "device": name + threads,
    }


def data_rank(accelerator):
    """(rank, ranks) among the processes that read different rows."""
    return accelerator.process_index, accelerator.num_processes


def start_tracker(accelerator, folder, project, run_name, settings):
    """Start the tracker that make_accelerator was given, if any; its local files go below `folder`.

    Args:
        folder: Path of the run; project, run_name: str; settings: flat dict of plain values.
    """
    accelerator.project_configuration.project_dir = str(folder)
    accelerator.project_configuration.logging_dir = str(folder / "tracker")
    kwargs = {"wandb": {"name": run_name, "dir": str(folder)}}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    accelerator.init_trackers(project, config=plain, init_kwargs=kwargs)


def agree_max(accelerator):
    """A function that takes the element-wise maximum of a list of floats over all processes, on the CPU.

    The group is gloo's, so that a reading of the clock never waits for the device's queue.
    """
    if accelerator.num_processes == 1:
        return list
    group = dist.new_group(backend="gloo")

    def reduce(values):
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return tensor.tolist()

    return reduce


def on_main(accelerator, function):
    """Call a function on the main process; every process gets its result, or its UserError.

    Args:
        function: without arguments; its result can be pickled.
    """
    result, fault = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = limit_reached(error)
            if fault is None:
                raise
    if accelerator.num_processes > 1:
        box = [(result, fault)]
        dist.broadcast_object_list(box, src=0)
        result, fault = box[0]
    if fault:
        raise UserError(fault)
    return result


def raise_together(accelerator, function):
    """Call a function on every process; a UserError of one is raised by all, so that none waits for it.

    Args:
        function: without arguments and result.
    """
    fault = None
    try:
        function()
    except UserError as error:
        fault = str(error)
    faults = [fault]
    if accelerator.num_processes > 1:
        faults = [None] * accelerator.num_processes
        dist.all_gather_object(faults, fault)
    fault = next((fault for fault in faults if fault), None)
    if fault:
        raise UserError(fault)


def main_first(accelerator, function):
    """Call a function on the main process, then on the others, where it finds what the first call left.

    Args:
        function: takes `first`, whether this is the first call. Its UserError on the main process ends all of them.
    Returns:
        each process's own result.
    """
    results = []
    on_main(accelerator, lambda: results.append(function(first=True)))
    return results[0] if results else function(first=False)


def shut_down(accelerator):
    """End the trackers and leave the process group, so that no process ends with a warning."""
    accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_dropout(seed, step, micro_batch):
    """Make the dropout of a micro-batch a function of its place in the run, not of what was drawn before.

    Args:
        seed, step, micro_batch: int; micro_batch counts over the whole global batch, whoever computes it.
    """
    digest = hashlib.blake2b(f"{seed} {step} {micro_batch}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _resolve_precision(asked, cpu):
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if asked and launched and asked != launched:
        flag = {"bf16": "--bf16", "fp16": "--fp16", "no": "--fp32"}[asked]
        raise UserError(
            f"{flag} contradicts the launcher's mixed_precision '{launched}': drop the flag, or give "
            f"accelerate launch --mixed_precision {asked}"
        )
    precision = asked or launched or ("bf16" if has_bf16("cpu" if cpu else "cuda") else "no")
    if precision == "fp16" and cpu:
        raise UserError("fp16 needs a GPU: use --bf16 or --fp32 (or mixed_precision: bf16 in the YAML) on a CPU")
    return precision
