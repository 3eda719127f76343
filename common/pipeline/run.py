"""Run a pipeline from its YAML: plan first, then stage after stage, each in a process of its own.

    bash scripts/run_pipeline.sh configs/quick.yaml [stage...] [--dry_run]

A finished stage leaves a stamp with what it was made with; a stage that was stopped is started again and continues by
itself. Each stage writes to a log that its processes lock, so what outlives a killed pipeline is waited for.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from common.errors import BAD_INPUT, UserError, run_main
from common.files import write_whole
from common.logged_process import Process, lock_log
from common.pipeline.config import read_pipeline
from common.pipeline.plan import STAGES, TRAIN, format_plan, plan
from common.progress import format_duration
from common.stop import StopSignals

POLL_SECONDS = 0.2
REMEDY = "--overwrite_output_dir makes it and what follows again, another --output_dir leaves it alone"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the arguments")


def parse_arguments(argv=None):
    """Read the command line. Args: argv: list of words, None = sys.argv[1:]. Returns: argparse.Namespace."""
    parser = _Parser(prog="run_pipeline.sh", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="A YAML as in configs/, or one of ExtremeBERT's.")
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"Only these: {', '.join(STAGES)} (default: all).")
    parser.add_argument("--dry_run", action="store_true", help="Show the plan and do nothing.")
    parser.add_argument("--output_dir", type=Path, help="Where everything goes (default: runs/<name of the YAML>).")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Make stages again whose settings have changed."
    )
    parser.add_argument(
        "--compare_with", type=Path, metavar="DIR", help="Another pipeline's folder, for the report to compare with."
    )
    args = parser.parse_intermixed_args(argv)
    if unknown := [name for name in args.stages if name not in STAGES]:
        raise UserError(f"stage {unknown[0]} is unknown: choose {', '.join(STAGES)}")
    return args


def main(argv=None):
    """Plan and run. Returns: exit code: 0; that of a failed stage; 128 + a signal."""
    args = parse_arguments(argv)
    pipeline = read_pipeline(args.config)
    out = args.output_dir or Path("runs") / args.config.stem
    stages = plan(pipeline, out, args.compare_with)
    chosen = [stage for stage in stages if not stage.off and (stage.name in args.stages or not args.stages)]
    stamps = Stamps(out)
    print(format_plan(pipeline, stages, out, {stage.name: stamps.state(stage) for stage in stages}), flush=True)
    if args.dry_run:
        return 0
    for name in sorted({*args.stages} - {stage.name for stage in chosen}):
        raise UserError(f"stage {name} has nothing to do by {args.config}: see the plan above")
    if args.compare_with and not args.compare_with.is_dir():
        raise UserError(f"--compare_with {args.compare_with}: no such folder; give another pipeline's")
    refuse_missing_gpus(pipeline, [stage for stage in chosen if not stamps.is_done(stage)])
    stamps.settle_changes(stages, args.overwrite_output_dir)
    refuse_gaps(stages, chosen, stamps)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    env, text = os.environ | {"PYTHONUNBUFFERED": "1"}, Path(args.config).read_text(encoding="utf-8")
    if key := pipeline.sections["WANDB"].get("API_KEY"):
        env["WANDB_API_KEY"], text = key, text.replace(key, "...")  # in no file, which the report may show
    write_whole(out / "pipeline.yaml", text)
    write_whole(out / "plan.json", json.dumps(_facts(pipeline, stages), indent=2) + "\n")
    stop = StopSignals()
    stop.listen()
    began = time.monotonic()
    for stage in chosen:
        if stamps.is_done(stage):
            print(f"== {stage.name}: done already", flush=True)
            continue
        if code := run_stage(stage, out, stamps, env, stop):
            return code
    print(f"all stages done in {format_duration(time.monotonic() - began)}", flush=True)
    for place in (stage.writes for stage in chosen if stage.name in ("submission", "report")):
        print(f"  {place}")
    return 0


def _facts(pipeline, stages):
    """What the report says of the plan."""
    commands = {stage.name: [str(command) for command in stage.commands] for stage in stages if not stage.off}
    pretrained = next(str(stage.writes) for stage in stages if stage.name == "pretrain")
    facts = {"config": str(pipeline.path), "text": pipeline.text, "pretrained": pretrained}
    return facts | {"commands": commands}


def refuse_missing_gpus(pipeline, stages):
    """Raise UserError where one of the stages trains and the YAML asks for more GPUs than there are."""
    if not any(stage.name in TRAIN for stage in stages):
        return
    asked, there = pipeline.sections["SYSTEM"].get("NUM_GPUS", 0), torch.cuda.device_count()
    if asked > there:
        raise UserError(
            f"{pipeline.path}: SYSTEM.NUM_GPUS {asked}, but this machine shows {there}: lower it (0: the processor)"
        )


def refuse_gaps(stages, chosen, stamps):
    """Raise UserError where a chosen stage follows one that is neither done nor chosen; the report needs none."""
    for stage in chosen:
        before = stages[: stages.index(stage)] if stage.name != "report" else []
        for one in before:
            if not (one.off or one.always or one in chosen or stamps.is_done(one)):
                raise UserError(
                    f"stage {stage.name} needs {one.name}, which is not done: run it first, or name it too"
                )


class Stamps:
    """What has been begun and finished, and with which settings: a file for each stage in out/stamps."""

    def __init__(self, out):
        self.folder = out / "stamps"

    def _path(self, stage):
        return self.folder / f"{stage.name}.json"

    def read(self, stage):
        """The stamp, None where the stage has not begun."""
        path = self._path(stage)
        return json.loads(path.read_text()) if path.exists() else None

    def remaining(self, stage):
        """Its commands that have to be run: all but those of a finished stage and those whose folders are there."""
        found = self.read(stage)
        finished = found and found["finished"] is not None and found["settings"] == stage.settings
        done = finished and not stage.always
        return [command for command in stage.commands if not (command.is_made if command.makes else done)]

    def is_done(self, stage):
        """Whether nothing of it has to be run, and it was not stopped since it began."""
        found = self.read(stage)
        return not self.remaining(stage) and (found is None or found["finished"] is not None)

    def state(self, stage):
        """What the plan says of it."""
        found = self.read(stage)
        if found and found["settings"] != stage.settings and not stage.always:
            return "was made with other settings"
        return "done" if self.is_done(stage) else ""

    def settle_changes(self, stages, overwrite):
        """Refuse a stage that was begun with other settings, or take it and what follows away.

        Args:
            stages: list of Stage; overwrite: take away.
        Raises:
            UserError: there is one, and it is not to be overwritten.
        """
        stamped = [(stage, self.read(stage)) for stage in stages if not stage.always and not stage.off]
        changed = [(stage, found) for stage, found in stamped if found and found["settings"] != stage.settings]
        if not changed:
            return
        first, found = changed[0]
        if not overwrite:
            raise UserError(f"stage {first.name} was made with other settings: {_difference(first, found)}; {REMEDY}")
        for stage in stages[stages.index(first) :]:
            self._remove(stage)

    def _remove(self, stage):
        if self.read(stage) is None:
            return
        out = self.folder.parent.resolve()
        if out in stage.writes.resolve().parents:  # what lies elsewhere may be others', too
            print(f"removing {stage.writes}, which stage {stage.name} is to make again", flush=True)
            shutil.rmtree(stage.writes) if stage.writes.is_dir() else stage.writes.unlink(missing_ok=True)
        self._path(stage).unlink()

    def begin(self, stage):
        """Note that it has begun; what it did in earlier calls counts."""
        found = self.read(stage)
        seconds = found["seconds"] if found and found["finished"] is None else 0.0
        self._write(stage, seconds, None)
        return seconds

    def finish(self, stage, seconds):
        """Note that it is done. Args: seconds: that it took, over all calls."""
        self._write(stage, seconds, time.strftime("%Y-%m-%d %H:%M:%S"))

    def interrupt(self, stage, seconds):
        """Note how long it took so far."""
        self._write(stage, seconds, None)

    def _write(self, stage, seconds, finished):
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"settings": stage.settings, "seconds": seconds, "finished": finished}
        write_whole(self._path(stage), json.dumps(facts, indent=2) + "\n")


def _difference(stage, found):
    """The first words in which the commands differ, or the files."""
    before, now = (" ; ".join(settings["commands"]).split() for settings in (found["settings"], stage.settings))
    for number, (old, new) in enumerate(zip(before, now, strict=False)):
        if old != new:
            flag = next((word for word in reversed(now[:number]) if word.startswith("--")), "")
            return f"{flag} {old} (now {new})".strip()
    if len(before) == len(now):
        return "its text has changed"
    return (
        f"without {' '.join(before[len(now) :])}" if len(before) > len(now) else f"with {' '.join(now[len(before) :])}"
    )


def run_stage(stage, out, stamps, env, stop):
    """Run what remains of a stage, one command after the other; what they print goes to its log and to the screen.

    Args:
        stage: Stage; out: Path; stamps: Stamps; env: dict; stop: StopSignals.
    Returns:
        exit code: 0; that of the command that failed; 128 + the signal.
    """
    log = out / "logs" / f"{stage.name}.log"
    print(f"== {stage.name}: {stage.does} (log {log})", flush=True)
    commands = stamps.remaining(stage)
    before, began = stamps.begin(stage), time.monotonic()
    for command in commands:
        code = run_command(command, log, env, stop)
        seconds = before + time.monotonic() - began
        if stop.requested:
            stamps.interrupt(stage, seconds)
            print(f"stopped in stage {stage.name}; the same command continues", flush=True)
            return 128 + stop.requested
        if code:
            stamps.interrupt(stage, seconds)
            print(f"error: stage {stage.name} ended with code {code}: {command}", file=sys.stderr)
            print(f"its log is {log}; once mended, the same command continues", file=sys.stderr, flush=True)
            return BAD_INPUT if code == BAD_INPUT else 1
    seconds = before + time.monotonic() - began
    stamps.finish(stage, seconds)
    print(f"== {stage.name}: done in {format_duration(seconds)}", flush=True)
    return 0


def run_command(command, log, env, stop):
    """Run a command to its end, or to a signal, which is passed on.

    Returns:
        its exit code.
    """
    words = [sys.executable, *command.words[1:]] if command.words[0] == "python" else list(command.words)
    waiting = False
    with open(log, "ab") as lock:
        while not lock_log(lock):
            if stop.requested:
                return 128 + stop.requested
            if not waiting:
                print(f"a process of an earlier call still writes to {log}; waiting for it", flush=True)
                waiting = True
            time.sleep(POLL_SECONDS)
        lock.write(f"$ {command}\n".encode())
        lock.flush()
        shown = lock.tell()
        process = Process(words, log, {**env, **command.env}, lock)
    told = False
    while True:
        code = process.poll()
        shown = _show(log, shown)
        if code is not None:
            return code
        if stop.requested and not told:
            told = True
            process.stop()
        time.sleep(POLL_SECONDS)


def _show(log, shown):
    """Copy what is new in a log to the screen. Returns: how far it is shown."""
    with open(log, "rb") as file:
        file.seek(shown)
        new = file.read()
    sys.stdout.buffer.write(new)
    sys.stdout.flush()
    return shown + len(new)


if __name__ == "__main__":
    run_main(main)
