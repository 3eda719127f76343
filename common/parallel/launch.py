"""What the launcher and the command line ask for, judged before anything is started."""

import importlib.util
import os
import shutil
from dataclasses import dataclass

import psutil
import torch

from common.errors import UserError
from common.hardware import has_bf16
from common.optimizers import is_elementwise

# What the first word of a YAML's `role` may be; accelerate's own strategies leave torchrun's "default".
ROLES = ("default", "cpu")
# accelerate's flags for the engines that it starts itself, by the `distributed_type` that sets them.
ENGINES = {"deepspeed": "ACCELERATE_USE_DEEPSPEED", "fsdp": "ACCELERATE_USE_FSDP"}


@dataclass(frozen=True)
class Launch:
    """What is asked for.

    engine: "deepspeed", "fsdp", or "plain" for one process or data parallelism. role: first word of the YAML's `role`.
    world: processes. cpu: whether to compute there. precision: "bf16", "fp16" or "no".
    """

    engine: str
    role: str
    world: int
    cpu: bool
    precision: str


def check_launch(precision, tracker, compiled=False):
    """Judge what the launcher and the command line ask for, without starting anything.

    Args:
        precision: "bf16", "fp16", "no" or None; what the command line asks for. It must agree with a launcher's.
        tracker: "none", or a name that accelerate knows; compiled: whether the model is to be compiled.
    Returns:
        Launch.
    Raises:
        UserError: an unknown role, contradicting or impossible precision, a tracker or a compiler that is missing.
    """
    if tracker != "none" and not importlib.util.find_spec(tracker):
        raise UserError(f"--report_to {tracker}: its package is missing; pip install {tracker}, or drop the flag")
    words = os.environ.get("ROLE_NAME", "").split() or ["default"]
    if words[0] not in ROLES or len(words) > 1:
        raise UserError(f"the YAML's role '{' '.join(words)}' is unknown: known roles are {', '.join(ROLES)}")
    cpu = words[0] == "cpu" or _is_set("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if compiled and cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--torch_compile needs a C++ compiler on a CPU: install g++, or drop the flag")
    return Launch(launched_engine(), words[0], launched_processes(), cpu, _resolve_precision(precision, cpu))


def launched_engine():
    """What the launcher asks to cut the model's tensors: "deepspeed", "fsdp", or "plain" for nothing."""
    return next((name for name, flag in ENGINES.items() if _is_set(flag)), "plain")


def check_optimizer(engine, optimizer):
    """Refuse an optimizer that would compute something else on what an engine gives it.

    Args:
        engine: as launched_engine; optimizer: as build_optimizer returned it.
    Raises:
        UserError: it looks at whole tensors and would see parts of them.
    """
    if engine == "plain" or is_elementwise(optimizer):
        return
    if engine == "fsdp" and getattr(optimizer, "sees_whole_dtensors", False):
        return
    other = "" if engine == "fsdp" else ", accelerate_configs/fsdp.yaml" * hasattr(optimizer, "sees_whole_dtensors")
    raise UserError(
        f"{type(optimizer).__name__} looks at whole tensors and would be given parts of them: give --optimizer_type "
        f"adamw, or choose accelerate_configs/ddp.yaml{other}"
    )


def launched_processes():
    """How many processes the launcher says there are."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdigit() or int(world) < 1:
        raise UserError(f"WORLD_SIZE is '{world}' in the environment: unset it, or start with accelerate launch")
    return int(world)


def restarts():
    """(how often torchrun has started the processes again, how often it may)."""
    return tuple(int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))


def launcher_started():
    """When the launcher of this process was started, in seconds since 1970."""
    return psutil.Process(os.getppid()).create_time()


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


def _is_set(name):
    return os.environ.get(name, "false").lower() in ("true", "1")
