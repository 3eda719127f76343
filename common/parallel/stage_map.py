"""PipeDream's conf.json: which modules make up each stage of a pipeline, and which processes run it.

Its files are taken as they are: JSON, or what Python prints of a dictionary, with single quotes, as in that system's
README. A model is cut into modules of equally many layers (the first has the embeddings too, the last the head), and
the loss is one module more.

Source: Narayanan et al. 2019 (PipeDream), 2021 (arXiv:2006.09503); `runtime/bert` of their repository.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

MODULES, RANKS, DEPTHS = "module_to_stage_map", "stage_to_rank_map", "stage_to_depth_map"


@dataclass(frozen=True)
class StageMap:
    """The stages of a pipeline, in order.

    path: the file they were read from. modules: of each stage, how many; without the loss. ranks: of each stage, the
    global ranks that run it, each for a part of the rows. warm_up: of each stage, micro-batches that go forward before
    the first comes back, where the file says so; else None.
    """

    path: Path
    modules: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    warm_up: tuple[int, ...] | None = None

    @property
    def processes(self):
        """How many processes the stages have together."""
        return sum(len(ranks) for ranks in self.ranks)

    @property
    def deals(self):
        """Whether some stages are on more processes than others, so that there are no whole copies of a pipeline."""
        return len({len(ranks) for ranks in self.ranks}) > 1

    def stage_of(self, rank):
        """The stage that a global rank runs."""
        return next(stage for stage, ranks in enumerate(self.ranks) if rank in ranks)

    def layers(self, number):
        """The layers of each stage; what does not go up in equal modules is spread over them, and none is lost.

        Args:
            number: of layers in the model.
        Returns:
            list of range, one for each stage.
        Raises:
            UserError: more modules than layers.
        """
        cut = sum(self.modules)
        if cut > number:
            raise UserError(
                f"{self.path}: {MODULES} has {cut} modules before the loss, the model {number} layers: give at most "
                "as many modules, or a deeper model"
            )
        ends = [sum(self.modules[: stage + 1]) * number // cut for stage in range(len(self.modules))]
        return [range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def check_processes(self, world):
        """Refuse another number of processes than the file's.

        Args:
            world: processes that the launcher has started.
        Raises:
            UserError: they are more or fewer.
        """
        if world != self.processes:
            raise UserError(
                f"{self.path}: {RANKS} names {self.processes} processes, the launcher has {world}: give "
                f"--num_processes {self.processes}, or change the file"
            )

    def check_dealing(self, micro_batches):
        """Refuse micro-batches that cannot be dealt out to the processes of each stage, or one stage alone.

        Args:
            micro_batches: that go through the stages together.
        Raises:
            UserError: the message names the entry.
        """
        if len(self.ranks) == 1:
            raise _fault(
                self.path,
                f"{MODULES} has one stage, which is data parallelism",
                "drop the file, and choose accelerate_configs/ddp.yaml",
            )
        for stage, ranks in enumerate(self.ranks if self.deals else ()):
            if micro_batches % len(ranks):
                raise _fault(
                    self.path,
                    f"{RANKS}['{stage}'] has {len(ranks)} ranks, to which micro_batches={micro_batches} of the YAML's "
                    "role cannot be dealt out evenly",
                    f"give a multiple of {len(ranks)} there, or each stage as many ranks",
                )

    def check_warm_up(self):
        """Refuse other warm-ups than those of the schedules.

        Raises:
            UserError: the message names the entry.
        """
        for stage, given in enumerate(self.warm_up or ()):
            ahead = passes_ahead([len(ranks) for ranks in self.ranks], stage)
            if given != ahead:
                raise _fault(self.path, f"{DEPTHS}['{stage}'] {given}", f"give {ahead}, or leave {DEPTHS} out")


def passes_ahead(processes, stage):
    """How many micro-batches a process of a stage takes forward before it takes the first one back.

    As many as there are processes behind its stage, over those of its stage; rounded up, so that none of those behind
    waits for a micro-batch (PipeDream's default is rounded down).

    Args:
        processes: of each stage, how many; stage: its number.
    """
    return -(-sum(processes[stage + 1 :]) // processes[stage])


def read_stage_map(path):
    """Read a conf.json of PipeDream.

    Args:
        path: of the file.
    Returns:
        StageMap.
    Raises:
        UserError: no such file, or an entry that makes no pipeline; the message names it.
    """
    path = Path(path)
    found = _load(path)
    known = (MODULES, RANKS, DEPTHS)
    if unknown := [key for key in found if key not in known]:
        raise _fault(path, f"'{unknown[0]}' is unknown", f"known are {', '.join(known)}")
    for key in (MODULES, RANKS):
        if key not in found:
            raise _fault(path, f"{key} is missing", "add it")
    modules = _modules(path, found[MODULES])
    ranks = _ranks(path, _by_stage(path, RANKS, found[RANKS], len(modules)))
    warm_up = found.get(DEPTHS)
    if warm_up is not None:
        warm_up = _by_stage(path, DEPTHS, warm_up, len(modules))
        for stage, depth in enumerate(warm_up):
            _check_whole(path, f"{DEPTHS}['{stage}']", depth)
    return StageMap(path, modules, ranks, warm_up)


def _load(path):
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: name a pipeline's conf.json") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            line = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else path
            raise UserError(f"{line}: neither JSON nor a dictionary as Python prints it: correct it") from error
    if not isinstance(found, dict):
        raise _fault(path, f"a {type(found).__name__} instead of a dictionary", f"give one with {MODULES} and {RANKS}")
    return found


def _modules(path, stages):
    """How many modules each stage has."""
    if not isinstance(stages, list | tuple) or len(stages) < 2:
        raise _fault(path, f"{MODULES} {stages!r}", "give the stage of each module in a list, the loss's last")
    for number, stage in enumerate(stages):
        entry = f"{MODULES}[{number}]"
        _check_whole(path, entry, stage)
        before = stages[number - 1] if number else -1
        if stage not in ((0,) if number == 0 else (before, before + 1)):
            remedy = (
                "begin with stage 0" if number == 0 else f"give {before} or {before + 1}: stages follow each other"
            )
            raise _fault(path, f"{entry} is stage {stage}", remedy)
    if stages[-1] != stages[-2]:
        entry = f"{MODULES}[{len(stages) - 1}], the loss, is stage {stages[-1]}"
        raise _fault(path, entry, f"put it on stage {stages[-2]}, with the last module")
    return tuple(stages[:-1].count(stage) for stage in range(stages[-1] + 1))


def _by_stage(path, name, entries, stages):
    """The values of a dictionary by stage, in the order of the stages."""
    if not isinstance(entries, dict):
        raise _fault(path, f"{name} {entries!r}", "give a dictionary by stage, as {'0': ..., '1': ...}")
    by_stage = {str(stage): value for stage, value in entries.items()}
    wanted = [str(stage) for stage in range(stages)]
    if missing := [stage for stage in wanted if stage not in by_stage]:
        raise _fault(path, f"{name}['{missing[0]}'] is missing", f"{MODULES} has stages 0 to {stages - 1}")
    if surplus := [stage for stage in by_stage if stage not in wanted]:
        raise _fault(path, f"{name}['{surplus[0]}'] is no stage", f"{MODULES} has stages 0 to {stages - 1}")
    return tuple(by_stage[stage] for stage in wanted)


def _ranks(path, stages):
    owner = {}
    for stage, ranks in enumerate(stages):
        entry = f"{RANKS}['{stage}']"
        if not isinstance(ranks, list | tuple) or not ranks:
            raise _fault(path, f"{entry} {ranks!r}", "give the ranks of its processes in a list")
        for rank in ranks:
            _check_whole(path, entry, rank)
            if rank in owner:
                raise _fault(path, f"{entry} has rank {rank} of stage {owner[rank]}", "give each rank once")
            owner[rank] = stage
    if absent := sorted(set(range(len(owner))) - owner.keys()):
        raise _fault(path, f"{RANKS} leaves out rank {absent[0]}", f"{len(owner)} ranks are 0 to {len(owner) - 1}")
    return tuple(tuple(ranks) for ranks in stages)


def _check_whole(path, entry, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _fault(path, f"{entry} {value!r}", "give a whole number, 0 or more")


def _fault(path, what, remedy):
    return UserError(f"{path}: {what}: {remedy}")
