"""From a pipeline's YAML to its stages: what each runs, where it writes, how long it should take."""

import os
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.arguments import parse_pretraining_arguments
from common.data.documents import expand_files
from common.data.glue import TASKS
from common.data.masking import targets_per_row
from common.errors import UserError
from common.glue.plan import PROTOCOLS, plan_runs, read_seeds, read_tasks
from common.glue.sweep import parse_sweep_arguments
from common.glue_arguments import parse_glue_arguments
from common.models.families import FAMILIES
from common.pipeline.config import FOLLOWS, GLUE_DIR
from common.prepare.arguments import parse_command
from common.prepare.inputs import is_remote
from common.progress import format_duration
from common.utilisation import masked_flops

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("environment", "data", "tokenizer", "pretrain", "finetune", "collect", "submission", "report")
TRAIN = ("pretrain", "finetune")  # of these, those that train
FOLLOWS_SEEDS = 3  # of the task that needs no data
FOLLOWS_ROWS = 16000  # of run_finetune_glue.sh
# What a time estimate assumes where the YAML gives no hours
GPU_FLOPS = 94e12  # a second: 30 % of an A100's bf16 peak
CORE_FLOPS = 30e9  # a second, measured on a 2-core machine without bf16 (README.md, Measured)
START_SECONDS = 15.0  # of a fine-tuning run
ROW_TOKENS = 50  # of a fine-tuning row
VOCABULARY = 30528
GLUE_ROWS = {  # of the training files that the benchmark distributes
    "cola": 8551,
    "sst2": 67349,
    "mrpc": 3668,
    "stsb": 5749,
    "qqp": 363846,
    "mnli": 392702,
    "qnli": 104743,
    "rte": 2490,
    "wnli": 635,
}


@dataclass(frozen=True)
class Command:
    """A command that a stage runs.

    words: as typed in the folder where the pipeline was started; env: added to it. makes: tuple of the folders for
    whose sake it is run, and is not where all are there; () where nothing shows it.
    """

    words: tuple
    env: dict = field(default_factory=dict)
    makes: tuple = ()

    @property
    def is_made(self):
        """Whether what it makes is there."""
        return bool(self.makes) and all(folder.is_dir() for folder in self.makes)

    def __str__(self):
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in self.env.items()), shlex.join(self.words)]
        )


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    does: in a few words; commands: tuple of Command; writes: Path; seconds: estimated, None where nobody knows, with
    basis, the reason. off: why it does not run. inputs: JSON value of the files that decide its result. always: run
    it whether or not it is done, as it takes seconds.
    """

    name: str
    does: str
    commands: tuple
    writes: Path
    seconds: float | None
    basis: str = ""
    off: str = ""
    inputs: list = field(default_factory=list)
    always: bool = False

    @property
    def settings(self):
        """What a finished stage must share with a later call; what a folder shows to be there is no part of it."""
        return {"commands": [str(command) for command in self.commands if not command.makes], "inputs": self.inputs}


def plan(pipeline, out, compare_with=None):
    """The stages of a pipeline, in their order.

    Args:
        pipeline: common.pipeline.config.Pipeline; out: Path of the pipeline's folder, which need not be there.
        compare_with: Path of another pipeline's folder, or None.
    Returns:
        list of Stage.
    Raises:
        UserError: a flag with a value that its script refuses.
    """
    return _Planner(pipeline, out, compare_with).stages()


class _Planner:
    def __init__(self, pipeline, out, compare_with):
        self.pipeline, self.out, self.compare_with = pipeline, out, compare_with
        self.scripts = Path(os.path.relpath(REPOSITORY))
        system, dataset = pipeline.sections["SYSTEM"], pipeline.sections["DATASET"]
        self.gpus = system.get("NUM_GPUS", 0)
        self.config = system.get("ACCELERATE_CONFIG", "" if self.gpus > 1 else "single_gpu" if self.gpus else "cpu")
        self.visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(self.gpus)))} if self.gpus else {}
        self.prepared = Path(dataset.get("OUTPUT_DIR", out / dataset.get("ID", "data")))
        self.pretrained = out / pipeline.sections["PRETRAIN"].get("ID", "pretrain")
        self.finetuned, self.zip = out / "finetune", out / "glue.zip"
        self.flags = {name: dict(flags) for name, flags in pipeline.flags.items()}
        self.data_dir = str(self.flags["FINETUNE"].pop("data_dir", GLUE_DIR))
        seeds = self.flags["FINETUNE"].pop("seeds", None)  # a list names them, a number says how many
        self.seeds = "".join(f"{seed}," for seed in seeds) if _is_list(seeds) else seeds and str(seeds)
        self.checkpoint = str(self.flags["FINETUNE"].pop("model_name_or_path", self.pretrained))

    def stages(self):
        made = [getattr(self, f"_{name}")() for name in STAGES]
        return [stage for stage in made if stage.commands]

    # ---- Commands

    def _bash(self, script, *words, makes=(), **env):
        return Command(("bash", str(self.scripts / "scripts" / script), *map(str, words)), env, makes)

    def _python(self, script, *words):
        return Command(("python", str(self.scripts / script), *map(str, words)))

    def _module(self, module, *words):
        env = {} if self.scripts == Path(".") else {"PYTHONPATH": str(self.scripts)}
        return Command(("python", "-m", module, *map(str, words)), env)

    def _off(self, section):
        return "" if self.pipeline.enabled(section) else f"{section}.ENABLED is False"

    def _checked(self, section, parse, words):
        """What a script's parser makes of its flags."""
        try:
            return parse([str(word) for word in words])
        except UserError as error:
            raise UserError(f"{self.pipeline.path}: {section}: {error}") from error

    # ---- Stages

    def _environment(self):
        does = "Python and what the scripts need, in .venv"
        venv = Path(os.environ.get("FRUGAL_VENV", self.scripts / ".venv"))
        return Stage("environment", does, (self._bash("setup.sh"),), venv, 0.0, "it is there", always=True)

    def _data(self):
        commands, off = [], self._off("DATASET")
        remote = [one for one in self._inputs() if is_remote(one)]
        if not off and remote:
            commands.append(self._python("prepare_pile_data.py", "download", *self._prepare_words()))
        if self.pipeline.enabled("FINETUNE"):
            if self.pipeline.offline_task:
                commands.append(self._module("common.data.follows", "--cache_dir", "runs/cache"))
            else:
                commands += self._fetch_glue()
        where = Path("runs/cache") if self.pipeline.offline_task else Path(self.data_dir)
        known = self.pipeline.offline_task and not remote
        basis = "" if known else "depends on the network"
        return Stage("data", "fetches what is not there yet", tuple(commands), where, 30.0 if known else None, basis)

    def _fetch_glue(self):
        names = self._checked("FINETUNE", read_tasks, self.pipeline.tasks)
        folders = {name: Path(self.data_dir) / TASKS[name].folder for name in names}
        fetch = partial(self._bash, "download_finetune_dataset.sh")
        if not self.pipeline.tasks:
            return [fetch("all", self.data_dir, makes=(*folders.values(),))]
        return [fetch(name, self.data_dir, makes=(folder,)) for name, folder in folders.items()]

    def _tokenizer(self):
        off = self._off("DATASET")
        name = self.pipeline.sections["TOKENIZER"].get("NAME_OR_PATH")
        does = f"{f'loads {name}' if name else 'trains a tokenizer'}, and turns the text into token files"
        if self.pipeline.embedded:
            words = [*self._pretrain_words(), "--check_arguments"]
            self._parse_pretraining(words)
            command = self._python("run_pretraining.py", *words)
            return Stage("tokenizer", does, (command,), Path("runs/cache"), 45.0, off=off)
        words = self._prepare_words()
        self._checked("DATASET", parse_command, words)
        size, files = self._text_bytes()
        seconds = None if size is None else 20 + size / (3e6 * (os.cpu_count() or 1))
        basis = "how much text it is, only the hub knows" if size is None else f"{size / 1e6:,.0f} MB of text"
        command = self._python("prepare_pile_data.py", *words)
        return Stage("tokenizer", does, (command,), self.prepared, seconds, basis, off, files)

    def _inputs(self):
        given = self.flags["DATASET"].get("input") or []
        return [*self.pipeline.folders, *([given] if isinstance(given, str) else given)]

    def _text_bytes(self):
        """(bytes of text, None where some is not here; [path, bytes, time of change] of what is here)."""
        files, whole = [], not self.pipeline.datasets
        for pattern in self._inputs():
            try:
                found = [] if is_remote(pattern) else expand_files(pattern)
            except UserError:
                found = []  # not there yet
            whole = whole and bool(found)
            facts = ((str(path), path.stat()) for path in found)
            files += [[path, stat.st_size, stat.st_mtime_ns] for path, stat in facts]
        return (sum(size for _, size, _ in files) if whole else None), files

    def _prepare_words(self):
        tokenizer = self.pipeline.sections["TOKENIZER"].get("NAME_OR_PATH")
        words = ["--input", *self._inputs()] if self._inputs() else []
        if self.pipeline.datasets:
            names, configs = zip(*self.pipeline.datasets, strict=True)
            words += ["--dataset_name", *names]
            if any(configs):
                words += ["--dataset_config_name", *(config or "default" for config in configs)]
        if self.pipeline.folders:  # ExtremeBERT's articles are separated by blank lines
            words += ["--document_separator", "blank_line"]
        if tokenizer:
            words += ["--tokenizer_name", tokenizer]
        memory = self.pipeline.sections["SYSTEM"].get("MAX_MEMORY_IN_GB")
        if memory and 2 * memory < (os.cpu_count() or 1):  # a worker takes up to 0.5 GB
            words += ["--workers", max(1, int(2 * memory))]
        given = {name: value for name, value in self.flags["DATASET"].items() if name != "input"}
        return [*words, *as_words(self.flags["TOKENIZER"] | given), "--output_dir", self.prepared]

    def _pretrain_words(self):
        """Flags of run_pretraining.py but for what says where it writes."""
        tokenizer, words = self.pipeline.sections["TOKENIZER"].get("NAME_OR_PATH"), []
        if self.pipeline.embedded:
            words += as_words(self.flags["TOKENIZER"])
            words += ["--tokenizer_name", tokenizer] if tokenizer else []
        else:
            words += ["--tokenizer_name", tokenizer or self.prepared / "tokenizer"]
        words += as_words(self.flags["PRETRAIN"])
        if self.pipeline.sections["WANDB"] and "report_to" not in self.flags["PRETRAIN"]:
            words += ["--report_to", "wandb"]
        return words

    def _parse_pretraining(self, words):
        text = (
            [] if self.pipeline.embedded else ["--dataset_path", self.prepared]
        )  # which is an argument of the script
        return self._checked("PRETRAIN", parse_pretraining_arguments, [*words, *text])

    def _pretrain(self):
        words = self._pretrain_words()
        model, data, args, _ = self._parse_pretraining(words)
        positional = (self.config, "", "", "embedded" if self.pipeline.embedded else self.prepared)
        words += ["--output_dir", self.pretrained, "--resume_from_checkpoint", "latest"]
        command = self._bash("run_pretraining.sh", *positional, *words, **self.visible)
        seconds, basis = self._pretrain_seconds(model, data, args)
        does = f"masked-language modelling, {'x'.join(str(model.shape[name]) for name in SHAPE)}"
        if model.model_name_or_path:
            does = f"masked-language modelling, from {model.model_name_or_path}"
        return Stage("pretrain", does, (command,), self.pretrained, seconds, basis, self._off("PRETRAIN"))

    def _pretrain_seconds(self, model, data, args):
        hours = [hours for hours in (args.total_training_time, args.early_exit_time_marker) if hours is not None]
        if hours and not args.max_train_steps:
            return 3600 * min(hours) + 60, f"{format_duration(3600 * min(hours))} of training by the YAML"
        if not args.max_train_steps or model.model_name_or_path:
            return None, "depends on the text" if not args.max_train_steps else "depends on the weights"
        rows = args.max_train_steps * args.train_batch_size
        targets = rows * targets_per_row(data.mlm_probability, data.max_seq_length)
        config = FAMILIES[model.family].config(**model.shape, vocab_size=model.vocab_size or VOCABULARY)
        flops = masked_flops(config, rows * data.max_seq_length, targets, data.max_seq_length)
        return self._seconds(flops, self.gpus or None)

    def _seconds(self, flops, devices):
        """(seconds, basis) of so many FLOPs on so many GPUs; None: on the processor."""
        if devices:
            what = f"{flops / 1e15:,.0f} PFLOP at {GPU_FLOPS / 1e12:.0f} TFLOP/s on each of {devices} GPU(s)"
            return flops / (devices * GPU_FLOPS) + 60, what
        cores = os.cpu_count() or 1
        what = f"{flops / 1e12:,.0f} TFLOP at {CORE_FLOPS / 1e9:.0f} GFLOP/s on each of {cores} cores"
        return flops / (cores * CORE_FLOPS) + 60, what

    def _finetune(self):
        off = self._off("FINETUNE")
        return self._finetune_follows(off) if self.pipeline.offline_task else self._finetune_glue(off)

    def _finetune_follows(self, off):
        flags = {name: value for name, value in self.flags["FINETUNE"].items() if name != "tasks"}
        words = as_words(flags)
        placed = ["--model_name_or_path", "x", "--train_file", "x", "--output_dir", "x", "--do_train"]
        _, data, args, _ = self._checked("FINETUNE", parse_glue_arguments, [*placed, *words])
        seeds = read_seeds(self.seeds, FOLLOWS_SEEDS)
        env = {"FRUGAL_SEEDS": " ".join(map(str, seeds)), "FRUGAL_OUTPUT": str(self.finetuned)} | self.visible
        command = self._bash("run_finetune_glue.sh", self.config, self.checkpoint, FOLLOWS, "", *words, **env)
        rows = (data.max_train_samples or FOLLOWS_ROWS) * (flags.get("num_train_epochs") or 1)
        runs = 2 * len(seeds)
        flops, devices = self._row_flops() * rows * runs, min(self.gpus, 1) or None
        seconds, basis = self._seconds(flops, devices)
        does = f"{FOLLOWS} with {len(seeds)} seed(s), pretrained and from random weights: {runs} runs"
        seconds += runs * START_SECONDS
        return Stage("finetune", does, (command,), self.finetuned, seconds, basis, off)

    def _row_flops(self):
        """FLOPs to learn from a row of a task, by the shape in PRETRAIN."""
        model, *_ = self._parse_pretraining(self._pretrain_words())
        layers, width = (model.shape[name] for name in SHAPE)
        return 6 * ROW_TOKENS * layers * (4 * width**2 + 2 * width * model.shape["intermediate_size"])

    def _finetune_glue(self, off):
        groups = self._gpu_groups()
        config = "ddp" if groups and len(groups[0]) > 1 else self.config or "single_gpu"
        words = as_words(self.flags["FINETUNE"]) + ["--do_predict", "--output_dir", self.finetuned]
        env = dict(self.visible)
        if groups:
            words += ["--num_processes", len(groups[0])]
            env = {"CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for group in groups for gpu in group)}
        given = ["--seeds", self.seeds] if self.seeds else []
        placed = ["--model_name_or_path", self.checkpoint, "--data_dir", self.data_dir, *given]
        args, others = self._checked("FINETUNE", parse_sweep_arguments, [*placed, *words])
        placed = ["--model_name_or_path", "x", "--task_name", args.tasks[0], "--output_dir", "x", "--do_train"]
        self._checked("FINETUNE", parse_glue_arguments, [*placed, *others])
        numbers = read_seeds(args.seeds, PROTOCOLS[args.protocol].seeds)
        values = args.learning_rates, args.train_batch_size, args.num_train_epochs
        runs = plan_runs(args.protocol, args.tasks, numbers, *values)
        positional = (self.checkpoint, self.data_dir, self.seeds or "", config)
        command = self._bash("run_glue_all.sh", *positional, *words, **env)
        rows = sum(GLUE_ROWS[run.task] * run.num_train_epochs for run in runs)
        at_once = max(1, len(groups) or self.gpus)
        devices = at_once * (len(groups[0]) if groups else 1) if self.gpus else None
        seconds, basis = self._seconds(self._row_flops() * rows, devices)
        does = f"{len(args.tasks)} GLUE task(s), {len(runs)} runs, {at_once} at a time"
        seconds += len(runs) * START_SECONDS / at_once
        return Stage("finetune", does, (command,), self.finetuned, seconds, basis, off)

    def _gpu_groups(self):
        """FINETUNE.MULTIPROCESS_GPU_LIST, judged."""
        groups = self.pipeline.sections["FINETUNE"].get("MULTIPROCESS_GPU_LIST") or []
        where = f"{self.pipeline.path}: FINETUNE.MULTIPROCESS_GPU_LIST"
        if not all(isinstance(group, list) and group for group in groups) or len({*map(len, groups)}) > 1:
            raise UserError(f"{where} {groups}: give lists of GPUs, all of one length, as [[0, 1], [2, 3]]")
        numbers = [gpu for group in groups for gpu in group]
        if len({*numbers}) < len(numbers) or not {*numbers} <= {*range(self.gpus)}:
            raise UserError(f"{where} {groups}: give each GPU once, from 0 to SYSTEM.NUM_GPUS - 1 ({self.gpus - 1})")
        return groups

    def _collect(self):
        command = self._module("common.pipeline.collect", self.finetuned, self.out / "results.json")
        off = self._off("RESULT_COLLECTION") or self._off("FINETUNE")
        return Stage("collect", "one table of tasks and seeds", (command,), self.out / "results.json", 5.0, off=off)

    def _submission(self):
        make = self._bash("make_glue_submission.sh", self.finetuned, self.zip, "--fill_missing")
        check = self._bash("make_glue_submission.sh", "--check", self.zip)
        off = self._off("RESULT_COLLECTION") or self._off("FINETUNE")
        return Stage("submission", "the zip for gluebenchmark.com, checked", (make, check), self.zip, 15.0, off=off)

    def _report(self):
        compare = ["--compare_with", self.compare_with] if self.compare_with else []
        command, page = self._module("common.pipeline.report", self.out, *compare), self.out / "report.html"
        return Stage("report", "one page about all of it", (command,), page, 10.0, always=True)


SHAPE = ("num_hidden_layers", "hidden_size")


def as_words(flags):
    """Flags as a command line has them: {"a": True, "b": [1, 2]} is --a true --b 1 2.

    Args:
        flags: dict of plain values, or lists of them.
    """
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(str(one).lower() if isinstance(one, bool) else str(one) for one in _listed(value))]
    return words


def _is_list(value):
    return isinstance(value, list)


def _listed(value):
    return value if _is_list(value) else [value]


def format_plan(pipeline, stages, out, states):
    """The plan as text.

    Args:
        pipeline: Pipeline; stages: list of Stage; out: Path; states: {name of a stage: what is said of it, or ""}.
    """
    lines = [f"pipeline: {pipeline.path}, in {out}", *(f"note: {note}" for note in pipeline.notes), ""]
    known, unknown = 0.0, []
    for number, stage in enumerate(stages, start=1):
        state = stage.off and f"left out: {stage.off}" or states.get(stage.name, "")
        if stage.seconds is None:
            time = stage.basis
        else:
            time = f"about {format_duration(stage.seconds)}" + (f" ({stage.basis})" if stage.basis else "")
        if not state and stage.seconds is None:
            unknown.append(stage.name)
        elif not state:
            known += stage.seconds
        lines += [f"{number}. {stage.name}: {stage.does}" + (f" [{state}]" if state else "")]
        lines += [f"     {command}" for command in stage.commands]
        lines += [f"   writes {stage.writes}; time: {time}", ""]
    total = f"time in all: about {format_duration(known)}"
    lines.append(total + (f", and that of {', '.join(unknown)}, which nobody knows" if unknown else ""))
    return "\n".join(lines)
