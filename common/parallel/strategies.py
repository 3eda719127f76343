"""From what the launcher asks for to an accelerator that does it, and what is in force then."""

import os
import warnings

import torch
from accelerate.utils import GradientAccumulationPlugin

from common.errors import UserError
from common.hardware import has_bf16
from common.models.stages import check_stages
from common.parallel.launch import check_launch, compiles_whole, restarts
from common.parallel.plain import PlainAccelerator
from common.parallel.processes import meet_again
from common.parallel.slicing import check_slices
from common.parallel.watch import start_watch


def make_accelerator(precision=None, tracker="none", pipeline_config=None):
    """Build the accelerator that the launcher asked for, and refuse one that differs from what it asked.

    Args:
        precision: "bf16", "fp16", "no" or None; what the command line asks for. It must agree with a launcher's.
        tracker: "none", or a name that accelerate knows; start_tracker starts it.
    Returns:
        common.parallel.plain.PlainAccelerator; set_batch comes before its prepare().
    Raises:
        UserError: processes that do not see each other, and what check_launch raises.
    """
    launch = check_launch(precision, tracker, pipeline_config=pipeline_config)
    if launch.world == 1 and launch.engine == "plain":  # a group of one: nothing to wrap, nothing to wait for
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    # Set by accelerate for its one-process launcher, and inherited by accident otherwise, where it would change
    # the strategy in silence; what it says is passed on as an argument instead.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    # torch's newer name for this argument is not one of accelerate's yet
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    if launch.cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # should something import DeepSpeed
    settings = {
        "log_with": None if tracker == "none" else tracker,
        "project_dir": ".",  # start_tracker gives the real one, which takes the processes to agree on
        "step_scheduler_with_optimizer": False,  # the schedule follows the budget, not the number of processes
        # an endless stream has no end of an epoch at which a half-full accumulation would have to be flushed
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
    }
    if launch.world > 1 and restarts()[0]:
        meet_again("gloo" if launch.cpu else "nccl")
    try:
        accelerator = _accelerator_class(launch)(launch, **settings)
    except ValueError as error:
        raise UserError(
            f"accelerate cannot start {launch.world} process(es): {error}; launch with accelerate launch"
        ) from error
    if accelerator.num_processes != launch.world:
        raise UserError(
            f"the launcher started {launch.world} processes but this one sees {accelerator.num_processes}: "
            "launch with accelerate_configs/cpu.yaml or accelerate_configs/ddp.yaml"
        )
    if accelerator.mixed_precision != launch.precision:
        raise UserError(
            f"{launch.precision} was asked for and accelerate has taken {accelerator.mixed_precision}: give "
            f"accelerate launch --mixed_precision {accelerator.mixed_precision}"
        )
    accelerator.compiles = compiles_whole(launch.engine, launch.role)
    if launch.world > 1:
        start_watch(accelerator.process_index, launch.world, accelerator.place_of)
    return accelerator


def _accelerator_class(launch):
    if launch.role == "colossalai":
        from common.parallel.colossalai import ColossalAccelerator  # imports Colossal-AI, which takes seconds

        return ColossalAccelerator
    if launch.engine == "deepspeed":
        from common.parallel.zero import ZeroAccelerator  # imports DeepSpeed, which takes seconds

        return ZeroAccelerator
    if launch.engine in ("fsdp", "tensor_parallel"):
        from common.parallel.sharded import ShardedAccelerator

        return ShardedAccelerator
    if launch.engine == "pipeline":
        from common.parallel.pipeline import PipelineAccelerator

        return PipelineAccelerator
    return PlainAccelerator


def check_cut(model, launch):
    """Refuse a model that the launcher's YAML asks to cut in vain.

    Args:
        model: of transformers; launch: as check_launch returns it.
    Raises:
        UserError: a family that cannot be cut so, or a shape.
    """
    check_slices(model.config, launch.sizes.slices)
    check_stages(model, launch.pipe)


def loader(accelerator):
    """How models with weights are to be loaded: as accelerator.load_pretrained of common.parallel.plain."""
    return accelerator.load_pretrained


def builder(accelerator):
    """How models with random weights are to be built: as accelerator.build of common.parallel.plain."""
    return accelerator.build


def set_batch(accelerator, per_device, accumulation, max_grad_norm):
    """Make the strategy follow the command line where it would follow its YAML. Before prepare().

    Args:
        per_device: rows in a micro-batch; accumulation: micro-batches of a process in a step; max_grad_norm: largest
            norm of a step's gradient, 0 for no limit.
    Raises:
        UserError: the YAML says something else.
    """
    accelerator.follow_command_line(per_device, accumulation, max_grad_norm)


def limit_memory(accelerator, cap_gb):
    """Tell a strategy that places tensors by itself how much memory a process may use. Before prepare().

    Args:
        cap_gb: GB of 1e9 bytes.
    """
    accelerator.limit_memory(cap_gb)


def set_accumulation(accelerator, accumulation):
    """Let the next step, and those after it, have another number of micro-batches. Between two steps.

    Args:
        accumulation: micro-batches of a process in a step, up to that of set_batch.
    """
    accelerator.set_accumulation(accumulation)


def compiles(accelerator, asked):
    """Whether the model is to be compiled as a whole, before prepare().

    Args:
        asked: --torch_compile, which check_flags has passed; None means on a GPU, where the strategy allows it.
    """
    return accelerator.compiles and accelerator.device.type == "cuda" if asked is None else asked


def describe(accelerator):
    """What is in force, for the line printed at start and for all_results.json.

    Returns:
        dict: strategy, world_size, precision ("fp32" where nothing is mixed), device.
    """
    threads = f" ({torch.get_num_threads()} threads)" if accelerator.device.type == "cpu" else ""
    name = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "cpu"
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and not has_bf16("cpu")
    if slow:
        threads += "; it has no bf16 and emulates it, tens of times slower: give --mixed_precision no, or --fp32"
    return {
        "strategy": accelerator.describe_strategy(),
        "world_size": accelerator.num_processes,
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "device": name + threads,
    }
