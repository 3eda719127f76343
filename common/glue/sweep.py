"""Runs run_glue.py for tasks x seeds x configurations, several at once where there are devices, and sums them up.

    bash scripts/run_glue_all.sh <checkpoint> <data-dir> [seeds] [accelerate-config] [extra flags...]

A run is finished when its all_results.json exists. It writes to a log whose lock it and all that it starts hold, so a
run that outlives a killed sweep is waited for, not started twice.
"""

import json
import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.hf_argparser import HfArg

from common.data.glue import TASKS
from common.errors import DIVERGED as DIVERGED_CODE
from common.errors import UserError, first_line, run_main
from common.flags import at_least, one_of, parse_known, positive
from common.glue.plan import FROM_MNLI, PROTOCOLS, is_local, plan_runs, read_seeds, read_tasks, tasks_with_data
from common.glue.summary import (
    DIVERGED,
    FAILED,
    FAILURE,
    read_run,
    summarise,
    write_summary,
)
from common.glue_arguments import parse_glue_arguments
from common.logged_process import Process, last_line, lock_log
from common.progress import format_duration
from common.report import write_all_results
from common.run_folder import RESULTS
from common.stop import StopSignals

SCRIPT = Path(__file__).resolve().parents[2] / "run_glue.py"
SETTINGS, LOG = "sweep.json", "run.log"
CHECKPOINTING_STEPS = 500  # of a run, so that one that was killed need not begin again
POLL_SECONDS, NEWS_SECONDS = 0.1, 30.0
THE_SWEEPS = {  # flags of run_glue.py that the sweep gives each run, and what to give instead
    "--task_name": "--tasks",
    "--seed": "seeds",
    "--learning_rate": "--learning_rates",
    "--resume_from_checkpoint": "nothing, it always continues",
    "--overwrite_output_dir": "another --output_dir",
    "--ignore_mismatched_sizes": "nothing, it is set with --init_from_mnli",
    "--train_file": "<data-dir>, in GLUE's layout",
    "--validation_file": "<data-dir>, in GLUE's layout",
    "--test_file": "<data-dir>, in GLUE's layout",
}


@dataclass
class SweepArguments:
    """Which runs, and on which devices. Any other flag is given to every run_glue.py."""

    model_name_or_path: str | None = HfArg(default=None, help="The checkpoint: a folder, or a hub name.")
    data_dir: str | None = HfArg(default=None, help="The GLUE root. A task whose files are not there is left out.")
    output_dir: str | None = HfArg(
        default=None, help="Where everything is written (default: runs/glue/<checkpoint>-<protocol>)."
    )
    protocol: str = HfArg(
        default="sane",
        help="sane (lr 4e-5, batch 16, 5 epochs for all tasks) or grid (ExtremeBERT's search, 156 runs a seed).",
    )
    seeds: str | None = HfArg(
        default=None, help="How many (5 means 1 to 5), or themselves with commas (default: sane 5, grid 1)."
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "Only these tasks (default: all nine)."})
    learning_rates: list[str] = field(
        default_factory=list, metadata={"help": "Instead of the protocol's; with commas or blanks between them."}
    )
    train_batch_size: int | None = HfArg(default=None, help="Rows in the global batch, instead of the protocol's.")
    num_train_epochs: float | None = HfArg(default=None, help="Passes over the rows, instead of the protocol's.")
    init_from_mnli: bool = HfArg(default=False, help="Start RTE, MRPC and STS-B from the best MNLI run.")
    do_predict: bool = HfArg(default=False, help="Write predictions for the test splits that are there.")
    config_file: str | None = HfArg(default=None, help="accelerate YAML of each run (default: one plain process).")
    num_processes: int = HfArg(default=1, help="Processes of each run; on GPUs it takes as many devices.")
    mixed_precision: str | None = HfArg(default=None, help="As of accelerate launch.")
    devices: str | None = HfArg(
        default=None, help="CUDA devices, with commas, over which the runs are spread (default: one run at a time)."
    )


def parse_sweep_arguments(argv=None):
    """Parse and check the command line.

    Args:
        argv: list of words without the program's name; None = sys.argv[1:].
    Returns:
        (SweepArguments, words): the words are flags of run_glue.py. tasks and learning_rates are cleaned.
    Raises:
        UserError: something missing or out of range, a flag that the sweep sets itself.
    """
    args, words = parse_known([SweepArguments], argv)
    if not args.model_name_or_path or not args.data_dir:
        raise UserError("give a checkpoint and the folder of GLUE's data: run_glue_all.sh <checkpoint> <data-dir>")
    one_of("protocol", args.protocol, PROTOCOLS)
    for name in ("train_batch_size", "num_processes"):
        at_least(args, name, 1)
    positive(args, "num_train_epochs")
    for word in words:
        flag = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if flag in THE_SWEEPS:
            raise UserError(f"{word} is the sweep's to set: give {THE_SWEEPS[flag]}")
        if flag == "--random_weights" and args.init_from_mnli:
            raise UserError("--random_weights and --init_from_mnli contradict each other: give one")
    args.tasks = read_tasks(args.tasks)
    rates = [word for text in args.learning_rates for word in text.split(",") if word]
    try:
        args.learning_rates = list(dict.fromkeys(map(float, rates)))
    except ValueError as error:
        raise UserError(f"--learning_rates {','.join(rates)}: give numbers, as 2e-5,3e-5") from error
    checkpoint = Path(args.model_name_or_path).expanduser()
    if not args.output_dir:
        args.output_dir = str(Path("runs") / "glue" / f"{checkpoint.resolve().name}-{args.protocol}")
    return args, words


def refuse_no_checkpoint(model_args):
    """Raise UserError where there is no checkpoint with this name: every run would say so in its turn.

    Args:
        model_args: GlueModelArguments.
    """
    name = model_args.model_name_or_path
    if is_local(name):
        if not (Path(name).expanduser() / "config.json").is_file():
            raise UserError(f"checkpoint {name}: no config.json there; give a folder that run_pretraining.py wrote")
        return
    try:
        PreTrainedConfig.get_config_dict(name, cache_dir=model_args.cache_dir)
    except (OSError, ValueError) as error:
        fault = first_line(error)
        raise UserError(f"checkpoint {name}: {fault}; give a folder that is there, or a hub name") from error


def run_command(args, words, run, start_from, predict):
    """The flags of one run_glue.py.

    Args:
        args: SweepArguments; words: more flags; run: Run; predict: whether it has a test split to predict.
        start_from: the checkpoint, or the folder of an MNLI run.
    Returns:
        list of str.
    """
    batch = str(run.train_batch_size)
    flags = ["--model_name_or_path", str(start_from), "--task_name", run.task, "--data_dir", args.data_dir]
    flags += ["--output_dir", str(Path(args.output_dir) / run.folder), "--do_train", "--do_eval"]
    flags += ["--seed", str(run.seed), "--learning_rate", repr(run.learning_rate)]
    flags += ["--num_train_epochs", repr(run.num_train_epochs)]
    flags += ["--train_batch_size", batch, "--per_device_train_batch_size", batch]
    flags += ["--checkpointing_steps", str(CHECKPOINTING_STEPS), "--save_total_limit", "1"]
    flags += [*PROTOCOLS[args.protocol].flags, *words, "--resume_from_checkpoint", "latest"]
    flags += ["--do_predict"] if predict else []
    return flags + (["--ignore_mismatched_sizes"] if str(start_from) != args.model_name_or_path else [])


def open_sweep(out, settings):
    """Make the sweep's folder ready: a new one, or that of the same sweep.

    Args:
        out: Path; settings: dict of plain values that all its runs share.
    Returns:
        dict: what sweep.json holds: the settings, and "mnli_run" where one was chosen.
    Raises:
        UserError: the folder is another sweep's, or cannot be used.
    """
    path = out / SETTINGS
    before = json.loads(path.read_text()) if path.exists() else dict(settings)
    different = [name for name in settings if before.get(name) != settings[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{out} holds a sweep with another {name}: {before.get(name)} (now {settings[name]}); use the same, or "
            "name another --output_dir"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_all_results(path, before)
    return before


def start_process(args, words, log, device):
    """Start a run_glue.py.

    Args:
        args: SweepArguments; words: its flags; log: Path; device: for CUDA_VISIBLE_DEVICES, None = leave it as it is.
    Returns:
        Process, or None where one that an earlier sweep has started still runs.
    """
    command = [sys.executable, str(SCRIPT)]
    if args.config_file:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", args.config_file]
        command += ["--num_processes", str(args.num_processes)]
        if args.mixed_precision:
            command += ["--mixed_precision", args.mixed_precision]
        command.append(str(SCRIPT))
    env = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    with open(log, "ab") as lock:
        return Process([*command, *words], log, env, lock) if lock_log(lock) else None


def device_groups(args):
    """Which devices each of the runs that go on at once may see.

    Returns:
        list of str for CUDA_VISIBLE_DEVICES; [None], one run and nothing said about devices, without --devices.
    """
    devices = [name for name in (args.devices or "").split(",") if name]
    size = args.num_processes
    groups = [",".join(devices[at : at + size]) for at in range(0, len(devices) - size + 1, size)]
    return groups or [",".join(devices) or None]


class Sweep:
    """The runs of a sweep, from the first to the last.

    Args:
        args: SweepArguments; words: flags for every run; runs: list of Run.
        start: as start_process, with these args; say: print; stop: StopSignals.
    """

    def __init__(self, args, words, runs, start, say, stop):
        self.args, self.words, self.runs = args, words, runs
        self.start, self.say, self.stop = start, say, stop
        self.out, self.constants = Path(args.output_dir), {}
        self.predicted = tasks_with_data(args.tasks, args.data_dir, ["test"]) if args.do_predict else []

    def result(self, run):
        """RunResult of what lies in a run's folder."""
        return read_run(run, self.out, self.constants)

    def results(self):
        """RunResults of all runs, in their order."""
        return [self.result(run) for run in self.runs]

    def run_all(self):
        """Start and watch every run that is not done, until none is left or the sweep is told to stop."""
        waiting = [run for run in self.runs if not self._is_done(run)]
        if len(waiting) < len(self.runs):
            self.say(f"{len(self.runs) - len(waiting)} of {len(self.runs)} runs are done already")
        free, active, news_at, told, busy = device_groups(self.args), {}, time.monotonic(), False, set()
        while active or (waiting and not self.stop.requested):
            for run, (process, device, began) in list(active.items()):
                if (code := process.poll()) is not None:
                    del active[run]
                    free.append(device)
                    self._finish(run, process, code, time.monotonic() - began)
            if self.stop.requested and not told:
                told = True
                for process, _, _ in active.values():
                    process.stop()
            for run in [] if self.stop.requested else self._ready(waiting, active):
                if not free:
                    break
                process = self._begin(run, free[0])
                if process is None:  # an earlier sweep's process works on it: look again later
                    if run not in busy:
                        self.say(f"{run.name}: a process of an earlier call still runs; waiting for it")
                    busy.add(run)
                    continue
                waiting.remove(run)
                if process:
                    active[run] = (process, free.pop(0), time.monotonic())
            if time.monotonic() - news_at > NEWS_SECONDS:
                news_at = time.monotonic()
                for run, (process, _, _) in active.items():
                    self.say(f"  {run.name}: {last_line(process.output()) or 'starting'}")
            time.sleep(POLL_SECONDS)

    def _is_done(self, run):
        """Finished, or diverged, which it would do again."""
        folder = self.out / run.folder
        diverged = (folder / FAILURE).exists() and self.result(run).status == DIVERGED
        return (folder / RESULTS).exists() or diverged

    def _ready(self, waiting, active):
        """The waiting runs whose checkpoint is there: all but those that start from an MNLI run that is not chosen."""
        from_mnli = self.args.init_from_mnli
        pending = from_mnli and any(run.task == "mnli" for run in (*waiting, *active))
        return [run for run in waiting if not (pending and run.task in FROM_MNLI)]

    def _begin(self, run, device):
        """Start a run: its Process; None where an earlier one still runs, False where there is nothing to start."""
        folder = self.out / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        start_from = self.args.model_name_or_path
        if self.args.init_from_mnli and run.task in FROM_MNLI:
            start_from = self._mnli_checkpoint()
            if start_from is None:
                self._fail(run, FAILED, "there is no MNLI run with a score to start from")
                return False
        words = run_command(self.args, self.words, run, start_from, run.task in self.predicted)
        process = self.start(words, folder / LOG, device)
        if process is not None:
            (folder / FAILURE).unlink(missing_ok=True)
            where = "" if device is None else f" on device {device}"
            self.say(f"{run.name}: started{where}, log {folder / LOG}")
        return process

    def _mnli_checkpoint(self):
        """Folder of the MNLI run from which the small tasks start: chosen once, so that all of them share it."""
        settings = json.loads((self.out / SETTINGS).read_text())
        if "mnli_run" not in settings:
            results = [self.result(run) for run in self.runs if run.task == "mnli"]  # at least one: plan_sweep
            best = summarise(results, self.constants)[0].best
            if best is None:
                return None
            settings["mnli_run"] = best.run.folder
            write_all_results(self.out / SETTINGS, settings)
            self.say(f"{', '.join(FROM_MNLI)} start from {self.out / settings['mnli_run']}")
        return self.out / settings["mnli_run"]

    def _finish(self, run, process, code, seconds):
        folder = self.out / run.folder
        if (folder / RESULTS).exists():
            for checkpoint in folder.glob("step_*"):  # was there for continuing
                shutil.rmtree(checkpoint)
            shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in (self.result(run).metrics or {}).items())
            self._count(run, f"{shown or 'no score'} ({format_duration(seconds)})")
        elif self.stop.requested:
            self.say(f"{run.name}: stopped")
        else:
            errors = re.findall("^error: (.*)", process.output(), re.MULTILINE)
            said = errors[-1] if errors else last_line(process.output())
            status = DIVERGED if code == DIVERGED_CODE else FAILED
            self._fail(run, status, said if status == DIVERGED else f"exit code {code}, {said}")

    def _fail(self, run, status, message):
        write_all_results(self.out / run.folder / FAILURE, {"status": status, "message": message})
        self._count(run, f"{status}: {message}")

    def _count(self, run, text):
        marks = (RESULTS, FAILURE)
        ended = sum(any((self.out / other.folder / mark).exists() for mark in marks) for other in self.runs)
        self.say(f"[{ended}/{len(self.runs)}] {run.name}: {text}")


def plan_sweep(args, words, say):
    """The runs that the flags ask for, of the tasks whose data is there.

    Args:
        args, words: of parse_sweep_arguments; say: print.
    Returns:
        (list of Run, names of the tasks without data).
    Raises:
        UserError: no task has data; --init_from_mnli without MNLI; a flag that run_glue.py does not know.
    """
    tasks = tasks_with_data(args.tasks, args.data_dir, ["train", "validation"])
    absent = [task for task in args.tasks if task not in tasks]
    if not tasks:
        folders = ", ".join(TASKS[task].folder for task in absent)
        raise UserError(f"<data-dir> {args.data_dir}: holds the files of no task; folders looked for: {folders}")
    if absent:
        say(f"no data below {args.data_dir}, left out: {', '.join(absent)}")
    chosen = Path(args.output_dir) / SETTINGS
    has_mnli = "mnli" in tasks or (chosen.exists() and "mnli_run" in json.loads(chosen.read_text()))
    if args.init_from_mnli and not has_mnli:
        raise UserError("--init_from_mnli needs MNLI among the tasks, with data: add it, or drop the flag")
    seeds = read_seeds(args.seeds, PROTOCOLS[args.protocol].seeds)
    runs = plan_runs(args.protocol, tasks, seeds, args.learning_rates, args.train_batch_size, args.num_train_epochs)
    for run in {run.configuration: run for run in runs}.values():
        model, *_ = parse_glue_arguments(run_command(args, words, run, args.model_name_or_path, args.do_predict))
    refuse_no_checkpoint(model)
    if args.init_from_mnli:  # the runs that others wait for come first
        runs.sort(key=lambda run: run.task != "mnli")
    return runs, absent


def sweep(argv=None, start=start_process, say=None, stop=None):
    """Run a sweep to its end, or to a signal.

    Args:
        argv: list of words, None = sys.argv[1:]; start: as start_process; say: instead of print; stop: StopSignals.
    Returns:
        exit code: 0; 1 where a run has failed; 128 + the signal.
    """
    args, words = parse_sweep_arguments(argv)
    say, stop = say or partial(print, flush=True), stop or StopSignals()
    runs, absent = plan_sweep(args, words, say)
    out = Path(args.output_dir)
    settings = {
        "checkpoint": _absolute(args.model_name_or_path),
        "data_dir": _absolute(args.data_dir),
        "protocol": args.protocol,
        "train_batch_size": args.train_batch_size,
        "num_train_epochs": args.num_train_epochs,
        "init_from_mnli": args.init_from_mnli,
        "do_predict": args.do_predict,
        "flags": words,
    }
    open_sweep(out, settings)
    tasks = list(dict.fromkeys(run.task for run in runs))
    at_once = len(device_groups(args))
    say(f"{len(runs)} runs of {len(tasks)} task(s), protocol {args.protocol}, {at_once} at a time: {out}")
    work = Sweep(args, words, runs, lambda words, log, device: start(args, words, log, device), say, stop)
    if without := [task for task in tasks if args.do_predict and task not in work.predicted]:
        say(f"no test split, not predicted: {', '.join(without)}")
    stop.listen()
    work.run_all()
    results = work.results()
    title = f"GLUE of {args.model_name_or_path}, protocol {args.protocol}"
    title += ", RTE, MRPC and STS-B from MNLI" if args.init_from_mnli else ""
    title += f", with {shlex.join(words)}" if words else ""  # they may overrule the protocol
    _, text = write_summary(out, title, results, work.constants, absent)
    say(f"\n{text}\n{out}: summary.txt, summary.csv, summary.png, runs.csv, selected.json")
    if stop.requested:
        say("stopped; the same command continues")
        return 128 + stop.requested
    if work.predicted:
        say(f"the test server's files: bash scripts/make_glue_submission.sh {shlex.quote(str(out))}")
    if any(result.status == FAILED for result in results):
        say(f"failed runs are tried again by the same command; their logs: {out}/<task>/<run>/{LOG}")
        return 1
    return 0


def _absolute(name):
    return str(Path(name).expanduser().resolve()) if is_local(name) else name


if __name__ == "__main__":
    run_main(sweep)
