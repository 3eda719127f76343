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
from common.models.stages import divide_layers
from common.optimizers import estimates_curvature, why_not_apart, why_not_in_parts
from common.parallel.colossalai_options import check_installed, parse_options
from common.parallel.fp8 import check_fp8
from common.parallel.stage_map import StageMap, passes_ahead, read_stage_map

# Schedules of a pipeline, with the number of stages that each process has.
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "2bw": 1, "2bw_corrected": 1}
DELAYED = ("2bw", "2bw_corrected")  # those whose updates come a step late
# What the first word of a YAML's `role` may be, with the options that follow it as name=value and what a value may be,
# None for a number; accelerate's own strategies leave torchrun's "default", and Colossal-AI's options are read in
# colossalai_options.py.
ROLES = {
    "default": {},
    "cpu": {},
    "tensor_parallel": {"size": None},
    "pipeline": {"schedule": SCHEDULES, "stages": None, "micro_batches": None},
    "colossalai": {},
}
# Roles that cut a model themselves, with what to do about another engine beside them.
TOGETHER = {
    "tensor_parallel": "together with FSDP it is parallelism_config_tp_size, see "
    "accelerate_configs/tensor_parallel_fsdp.yaml",
    "pipeline": "stages are not cut once more",
    "colossalai": "it cuts by itself",
}
NAMES = {  # what to call engines, for people
    "deepspeed": "DeepSpeed ZeRO-{stage}",
    "fsdp": "FSDP2",
    "tensor_parallel": "tensor parallelism",
    "pipeline": "a pipeline with schedule={schedule}",
    "colossalai": "Colossal-AI's plugin={plugin}",
}
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


class Pipe(NamedTuple):
    """A pipeline: name in SCHEDULES, number of stages, micro-batches in which a batch goes through them.

    stage_map: StageMap that says which layers and processes make up each stage; None: as many layers on each as can
    be, on processes that follow each other. A process has a place among those of its copy of the pipeline, from 0 on.
    Where the map deals micro-batches out, there is one copy, and the places of a stage follow each other.
    """

    schedule: str = "none"
    stages: int = 1
    micro_batches: int = 1
    stage_map: StageMap | None = None

    @property
    def processes(self):
        """How many processes its stages are on."""
        return self.stage_map.processes if self.deals else self.stages // SCHEDULES.get(self.schedule, 1)

    @property
    def deals(self):
        """Whether the micro-batches of a batch are dealt out to the processes of each stage; else there are copies."""
        return self.stage_map is not None and self.stage_map.deals

    @property
    def dealt(self):
        """To how many places of a copy the micro-batches go, for each stage."""
        return [len(ranks) for ranks in self.stage_map.ranks] if self.deals else [1] * self.stages

    def numbers(self, place):
        """The numbers of the stages at a place."""
        if self.deals:
            return [stage for stage in range(self.stages) if place in self.places(stage)]
        return list(range(place, self.stages, self.processes))

    def places(self, stage):
        """The places of a stage; micro-batch k is for the one with the number k modulo theirs."""
        if self.deals:
            begin = sum(self.dealt[:stage])
            return range(begin, begin + self.dealt[stage])
        return range(stage % self.processes, stage % self.processes + 1)

    def place(self, stage, micro_batch=0):
        """Where a stage has a micro-batch. Args: micro_batch: its number in its batch."""
        places = self.places(stage)
        return places[micro_batch % len(places)]

    @property
    def parts(self):
        """How many parts a checkpoint has."""
        return self.stages if self.deals else self.processes

    def part(self, place):
        """The number of the part of a checkpoint that has what is held at a place."""
        return self.numbers(place)[0] if self.deals else place

    def ahead(self, stage):
        """How many micro-batches a stage takes forward at a place before the first one comes back."""
        return passes_ahead(self.dealt, stage)

    def layers(self, number):
        """The layers of each stage: list of range. Args: number: of them in the model. Raises: UserError."""
        return self.stage_map.layers(number) if self.stage_map else divide_layers(number, self.stages)

    def seat(self, rank):
        """(copy of the pipeline, place in it) of a process."""
        if self.stage_map is None:
            return divmod(rank, self.processes)
        if self.deals:
            return 0, sum(self.stage_map.ranks, ()).index(rank)
        stage = self.stage_map.stage_of(rank)
        return self.stage_map.ranks[stage].index(rank), stage

    def rank(self, copy, place):
        """The process that has a place in a copy of the pipeline."""
        if self.deals:
            return sum(self.stage_map.ranks, ())[place]
        return copy * self.processes + place if self.stage_map is None else self.stage_map.ranks[place][copy]


@dataclass(frozen=True)
class Launch:
    """What is asked for.

    engine: as launched_engine. role: first word of the YAML's `role`. options: its others, as parse_role. world:
    processes. sizes: their arrangement; pipe: the pipeline in each copy. cpu: whether to compute there. precision:
    "bf16", "fp16", "fp8" or "no".
    """

    engine: str
    role: str
    options: dict
    world: int
    sizes: Sizes
    pipe: Pipe
    cpu: bool
    precision: str


def check_launch(precision, tracker, compiled=False, pipeline_config=None):
    """Judge what the launcher and the command line ask for, without starting anything.

    Args:
        precision: "bf16", "fp16", "no" or None; what the command line asks for. It must agree with a launcher's.
        tracker: "none", or a name that accelerate knows; compiled: whether the model is to be compiled.
        pipeline_config: as launched_pipe.
    Returns:
        Launch.
    Raises:
        UserError: an unknown role, contradicting or impossible precision, a tracker or a compiler that is missing,
            stages that cannot be.
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
    sizes, pipe = launched_sizes(pipeline_config), launched_pipe(pipeline_config)
    return Launch(launched_engine(), role, options, launched_processes(), sizes, pipe, cpu, precision)


def launched_engine():
    """What cuts a model: "deepspeed", "fsdp", "tensor_parallel", "pipeline", "colossalai"; "plain": nothing does."""
    engine, (role, options) = next((name for name, flag in ENGINES.items() if _is_set(flag)), "plain"), launched_role()
    if role not in TOGETHER:
        return engine
    if engine != "plain":
        raise UserError(f"the YAML's role {role} is for distributed_type: MULTI_GPU; {TOGETHER[role]}")
    return "plain" if options.get("plugin") == "ddp" else role


def launched_sizes(pipeline_config=None):
    """How the launcher asks to arrange the processes: Sizes.

    Args:
        pipeline_config: as launched_pipe.
    Raises:
        UserError: their number does not go up in the sizes.
    """
    world, engine = launched_processes(), launched_engine()
    if engine == "tensor_parallel":
        slices = launched_role()[1]["size"]
        sizes = Sizes(world // slices, 1, slices)
    elif engine == "pipeline":
        processes = launched_pipe(pipeline_config).processes
        if world % processes:
            raise UserError(
                f"the YAML's role has stages for {processes} processes and num_processes is {world}: change the "
                "stages, or give a multiple"
            )
        return Sizes(world // processes, 1, 1)
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


def launched_pipe(pipeline_config=None):
    """The pipeline that the launcher asks for: Pipe, of one stage where there is none.

    Args:
        pipeline_config: path of PipeDream's conf.json, whose stages take the place of the YAML's; or None.
    Raises:
        UserError: numbers that no schedule fits, a file that cannot be followed.
    """
    role, options = launched_role()
    if role != "pipeline":
        if pipeline_config is not None:
            raise UserError(
                f"--pipeline_config {pipeline_config} is for a YAML with stages: launch with accelerate_configs/"
                "pipeline_1f1b.yaml or another pipeline_*.yaml, or drop the flag"
            )
        return Pipe()
    pipe = Pipe(**options)
    each = SCHEDULES[pipe.schedule]
    if pipeline_config is not None:
        stage_map = read_stage_map(pipeline_config)
        stage_map.check_processes(launched_processes())
        stage_map.check_dealing(pipe.micro_batches)
        stage_map.check_warm_up()
        if each > 1:
            raise UserError(
                f"the YAML's role: schedule={pipe.schedule} has {each} stages on each process, and {pipeline_config} "
                "gives each process one: choose accelerate_configs/pipeline_1f1b.yaml"
            )
        pipe = pipe._replace(stages=len(stage_map.ranks), stage_map=stage_map)
    schedule, stages, micro_batches, _ = pipe
    if schedule == "1f1b" and micro_batches < stages:
        raise UserError(
            f"the YAML's role: schedule=1f1b with {stages} stages needs as many micro-batches, and micro_batches="
            f"{micro_batches}: give more, or schedule=gpipe"
        )
    if stages % each or stages // each < 2:
        raise UserError(
            f"the YAML's role: schedule={schedule} has {each} stage(s) on each of two or more processes, and "
            f"stages={stages} does not go up in that: give a multiple of {each} from {2 * each} on"
        )
    if each > 1 and micro_batches % pipe.processes:
        raise UserError(
            f"the YAML's role: schedule={schedule} takes micro-batches in rounds of one for each process: "
            f"micro_batches={micro_batches} is no multiple of {pipe.processes}"
        )
    return pipe


def check_micro_batches(pipe, per_device, accumulation):
    """Refuse a batch that does not go through a pipeline.

    Args:
        pipe: Pipe; per_device: rows that a device takes at once; accumulation: how often in a step.
    Raises:
        UserError: rows that cannot be cut into micro-batches, or too few of them for two versions of the weights.
    """
    schedule, _, micro_batches, _ = pipe
    if per_device % micro_batches:
        raise UserError(
            f"--per_device_train_batch_size {per_device} cannot be cut into the {micro_batches} micro-batches of the "
            "YAML's role: give a multiple, or change micro_batches"
        )
    if schedule in DELAYED and micro_batches * accumulation < pipe.processes:
        raise UserError(
            f"PipeDream-2BW with stages on {pipe.processes} processes needs {pipe.processes} or more micro-batches in "
            f"a step, so that two versions of the weights are enough; there are {micro_batches * accumulation}: raise "
            "micro_batches in the YAML's role"
        )


def refuse_delay():
    """Refuse a pipeline whose updates come late, where there are few of them.

    Raises:
        UserError: the YAML asks for it.
    """
    schedule = launched_role()[1].get("schedule")
    if schedule in DELAYED:
        raise UserError(
            f"the YAML's role: schedule={schedule} applies each gradient one step late, which a short fine-tuning "
            "does not make up for: choose accelerate_configs/pipeline_1f1b.yaml"
        )


def compiles_whole(engine, role):
    """Whether a strategy lets a model be compiled as a whole before it is wrapped.

    Args:
        engine: as launched_engine; role: first word of the YAML's.
    """
    return engine == "plain" and role != "colossalai"


def check_flags(compiled=None, tries_batches=False, ema_decay=None):
    """Refuse flags that what the launcher asks for cannot follow.

    Args:
        compiled: --torch_compile; tries_batches: --auto_find_batch_size; ema_decay: --ema_decay, or None.
    Raises:
        UserError: one of them is given in vain.
    """
    engine, (role, options) = launched_engine(), launched_role()
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2"  # as accelerate has it
    named = NAMES.get(role if role == "colossalai" else engine, "").format(stage=stage, **options)
    if compiled and not compiles_whole(engine, role):
        raise UserError(
            f"--torch_compile: {named} works between the layers of a model, which would be compiled as a whole: drop "
            "the flag"
        )
    if tries_batches and (engine in ("deepspeed", "pipeline") or role == "colossalai"):  # a backward pass may update
        raise UserError(f"--auto_find_batch_size cannot try sizes under {named}: give --per_device_train_batch_size")
    twice = engine == "deepspeed" and stage == "3"  # small parameters, cut and whole; below: versions, masters
    twice |= options.get("schedule") in DELAYED or options.get("plugin", "ddp") != "ddp"
    if ema_decay is not None and twice:
        raise UserError(
            f"--ema_decay: {named} holds weights in more than one place: choose accelerate_configs/zero2.yaml or "
            "fsdp.yaml"
        )


def launched_data_ranks(pipeline_config=None):
    """How many of the processes that the launcher says there are read different rows. Args: as launched_pipe."""
    slices, processes = launched_sizes(pipeline_config).slices, launched_pipe(pipeline_config).processes
    return launched_processes() // (slices * processes)


def check_optimizer(engine, optimizer):
    """Refuse an optimizer that would compute something else on what an engine gives it.

    Args:
        engine: as launched_engine; optimizer: as build_optimizer returned it.
    Raises:
        UserError: it looks at whole tensors and would see parts of them, or wants gradients that it cannot get, or is
            another than the one that the strategy has.
    """
    if estimates_curvature(optimizer) and (engine in ("deepspeed", "pipeline") or launched_role()[0] == "colossalai"):
        raise UserError(
            f"{type(optimizer).__name__} wants gradients that are not for an update, and here a backward pass leads "
            "to one: give --optimizer_type adamw, or choose accelerate_configs/ddp.yaml or fsdp.yaml"
        )
    if launched_role()[1].get("plugin") == "gemini":
        if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam) or optimizer.defaults["amsgrad"]:
            raise UserError(
                f"Gemini has its own Adam, and {type(optimizer).__name__} is another optimizer: give --optimizer_type "
                "adamw, or take accelerate_configs/colossalai_zero2.yaml"
            )
        return
    if engine == "pipeline":
        if reason := why_not_apart(optimizer):
            remedy = "give --optimizer_type adamw, or choose accelerate_configs/ddp.yaml"
            raise UserError(f"{type(optimizer).__name__} {reason}: {remedy}")
        return
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
    if not _is_count(world):
        raise UserError(f"WORLD_SIZE is '{world}' in the environment: unset it, or start with accelerate launch")
    return int(world)


def launched_machines():
    """How many machines those processes are on: as many on each, as torchrun says; one where nothing says it."""
    world = launched_processes()
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, world // int(here)) if _is_count(here) else 1


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
    pairs, known = [option.partition("=")[::2] for option in options], ROLES[name]
    fits = tuple(key for key, _ in pairs) == tuple(known)
    if not fits or not all(value in known[key] if known[key] else _is_count(value) for key, value in pairs):
        wanted = (f"{key}={'|'.join(values) if values else 'N'}" for key, values in known.items())
        form = " ".join([name, *wanted])
        raise UserError(f"the YAML's role '{text}' is not understood: it is written '{form}', N from 1 on")
    return name, {key: value if known[key] else int(value) for key, value in pairs}


def _is_count(text):
    return text.isascii() and text.isdigit() and int(text) > 0


def launched_role():
    """(first word of the YAML's role, dict of its options), as parse_role."""
    return parse_role(os.environ.get("ROLE_NAME") or "default")


def _parallelism():
    """The sizes that the YAML's parallelism_config gives, by name, where they are more than one."""
    found = {}
    for name, value in os.environ.items():
        if name.startswith(PARALLELISM) and name.endswith("_SIZE") and _is_count(value) and int(value) > 1:
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
    engine, (role, options) = launched_engine(), launched_role()
    plugin = options.get("plugin")
    if precision == "fp16" and cpu and role != "colossalai":  # whose substitutes for CUDA know it
        raise UserError("fp16 needs a GPU: use --bf16 or --fp32 (or mixed_precision: bf16 in the YAML) on a CPU")
    if precision == "fp16" and engine == "pipeline":
        raise UserError("fp16 is not supported in a pipeline: take bf16")
    if precision == "fp16" and engine in ("fsdp", "tensor_parallel"):
        raise UserError("fp16 is not supported under FSDP and tensor parallelism: take bf16, or a ZeRO YAML")
    if precision == "fp16" and plugin == "ddp":
        raise UserError("the YAML's plugin=ddp has no fp16 here: take accelerate_configs/ddp.yaml, which does it")
    if precision == "no" and plugin == "gemini":
        raise UserError(
            "Gemini trains in bf16 or fp16: give --bf16 (accelerate launch --mixed_precision bf16), or take "
            "accelerate_configs/colossalai_zero2.yaml"
        )
    if precision == "fp8":
        check_fp8(engine, cpu)
    return precision


def _is_set(name):
    return os.environ.get(name, "false").lower() in ("true", "1")
