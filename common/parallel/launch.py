"""What the launcher and the command line ask for, judged before anything is started."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from common.errors import UserError
from common.hardware import has_bf16
from common.optimizers import why_not_in_parts
from common.parallel.colossalai_options import check_installed, parse_options
from common.parallel.fp8 import check_fp8

# What the first word of a YAML's `role` may be, with the options that follow it as name=number; accelerate's own
# strategies leave torchrun's "default", and Colossal-AI's options are read in colossalai_options.py.
ROLES = {"default": (), "cpu": (), "tensor_parallel": ("size",), "colossalai": ()}
# accelerate's flags for the engines that it starts itself, by the `distributed_type` that sets them.
ENGINES = {"deepspeed": "ACCELERATE_USE_DEEPSPEED", "fsdp": "ACCELERATE_USE_FSDP"}
PARALLELISM = "PARALLELISM_CONFIG_"


class Sizes(NamedTuple):
    """How the processes are arranged: copies of the model, parts of a copy, slices of each layer in a part.

    Processes that hold slices of the same layers read the same rows.
    """

    copies: int
    shards: int
    slices: int


@dataclass(frozen=True)
class Launch:
    """What is asked for.

    engine: as launched_engine. role: first word of the YAML's `role`. options: its others, as parse_role. world:
    processes. sizes: their arrangement. cpu: whether to compute there. precision: "bf16", "fp16", "fp8" or "no".
    """

    engine: str
    role: str
    options: dict
    world: int
    sizes: Sizes
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
    role, options = launched_role()
    if role == "colossalai":
        check_installed()
    cpu = role == "cpu" or _is_set("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if compiled and cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--torch_compile needs a C++ compiler on a CPU: install g++, or drop the flag")
    precision = _resolve_precision(precision, cpu)
    return Launch(launched_engine(), role, options, launched_processes(), launched_sizes(), cpu, precision)


def launched_engine():
    """Who is to cut the model's tensors: "deepspeed", "fsdp", "tensor_parallel", "colossalai"; "plain": nobody."""
    engine, (role, options) = next((name for name, flag in ENGINES.items() if _is_set(flag)), "plain"), launched_role()
    if role not in ("tensor_parallel", "colossalai"):
        return engine
    if engine != "plain":
        together = "; together with FSDP it is parallelism_config_tp_size, see accelerate_configs/"
        together = f"{together}tensor_parallel_fsdp.yaml" if role == "tensor_parallel" else ""
        raise UserError(f"the YAML's role {role} is for distributed_type: MULTI_GPU{together}")
    return "plain" if options.get("plugin") == "ddp" else role


def launched_sizes():
    """How the launcher asks to arrange the processes: Sizes.

    Raises:
        UserError: their number does not go up in the sizes.
    """
    world, engine = launched_processes(), launched_engine()
    if engine == "tensor_parallel":
        slices = launched_role()[1]["size"]
        sizes = Sizes(world // slices, 1, slices)
    elif engine == "fsdp":
        given = _parallelism()
        copies, slices = given.get("dp_replicate", 1), given.get("tp", 1)
        sizes = Sizes(copies, given.get("dp_shard", world // (copies * slices)), slices)
    else:
        sizes = Sizes(world, 1, 1)
    if sizes.copies * sizes.shards * sizes.slices != world:
        raise UserError(
            f"the YAML's {' x '.join(f'{size} {name}' for name, size in sizes._asdict().items())} of the model are "
            f"not its number of processes, {world}: change num_processes or a size"
        )
    return sizes


def launched_data_ranks():
    """How many of the processes that the launcher says there are read different rows."""
    return launched_processes() // launched_sizes().slices


def check_optimizer(engine, optimizer):
    """Refuse an optimizer that would compute something else on what an engine gives it.

    Args:
        engine: as launched_engine; optimizer: as build_optimizer returned it.
    Raises:
        UserError: it looks at whole tensors and would see parts of them.
    """
    if engine == "plain" or not (reason := why_not_in_parts(optimizer, in_turn=engine == "deepspeed")):
        return
    sees_whole = getattr(optimizer, "sees_whole_dtensors", False)
    if sees_whole and engine in ("fsdp", "tensor_parallel"):
        return
    other = ", accelerate_configs/fsdp.yaml" if sees_whole else ""
    raise UserError(
        f"{type(optimizer).__name__} {reason}: give --optimizer_type adamw, or choose "
        f"accelerate_configs/ddp.yaml{other}"
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


def parse_role(text):
    """What a YAML's role says: (its first word, dict of its options).

    Args:
        text: "name option=value ...", with a name and options of ROLES.
    Raises:
        UserError: it is none of them.
    """
    name, *options = text.split()
    if name not in ROLES:
        raise UserError(f"the YAML's role '{text}' is unknown: known roles are {', '.join(ROLES)}")
    if name == "colossalai":
        return name, parse_options(options)
    pairs = [option.partition("=")[::2] for option in options]
    if tuple(key for key, _ in pairs) != ROLES[name] or not all(value.isdigit() and int(value) for _, value in pairs):
        wanted = " ".join([name, *(f"{option}=N" for option in ROLES[name])])
        raise UserError(f"the YAML's role '{text}' is not understood: it is written '{wanted}', N from 1 on")
    return name, {key: int(value) for key, value in pairs}


def launched_role():
    """(first word of the YAML's role, dict of its options), as parse_role."""
    return parse_role(os.environ.get("ROLE_NAME") or "default")


def _parallelism():
    """The sizes that the YAML's parallelism_config gives, by name, where they are more than one."""
    found = {}
    for name, value in os.environ.items():
        if name.startswith(PARALLELISM) and name.endswith("_SIZE") and value.isdigit() and int(value) > 1:
            found[name.removeprefix(PARALLELISM).removesuffix("_SIZE").lower()] = int(value)
    if unknown := sorted(found.keys() - {"dp_replicate", "dp_shard", "tp"}):
        raise UserError(f"the YAML's parallelism_config {unknown[0]}_size is not supported: set it to 1")
    return found


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
    if precision == "fp8":
        check_fp8(launched_engine(), cpu)
    return precision


def _is_set(name):
    return os.environ.get(name, "false").lower() in ("true", "1")
