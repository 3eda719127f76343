"""The folder of a run: whether a new run may be written there, whether an old one is to be continued or is done."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from common import parallel
from common.checkpoint import (
    complete_checkpoints,
    put_later_checkpoints_aside,
    refuse_other_settings,
    resolve_checkpoint,
)
from common.errors import UserError
from common.models.presets import GENERATOR
from common.resume import SAID_ON_RESUME

ARGUMENTS, RESULTS, METRICS, READINGS = "args.json", "all_results.json", "metrics.jsonl", "clock.f64"
AVERAGE = "ema"  # the model with the average of the weights
# What a run writes, and so what --overwrite_output_dir may remove; anything else in the folder is left alone.
OWN_FILES = (ARGUMENTS, RESULTS, METRICS, READINGS, "curves.png", "README.md", "config.json", "model.safetensors")
OWN_FILES += ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "tracker")
OWN_FILES += (AVERAGE, GENERATOR)
OWN_PATTERNS = ("step_*", "marker_*", "model-*-of-*.safetensors", "model.safetensors.index.json")
OWN_PATTERNS += ("eval_predictions*.tsv", "eval_plot*.png", "predict_results*.tsv")


def make_run_folder():
    """Create runs/<time>, in the local time zone; runs that start in the same second get a number behind it."""
    base = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    for folder in (base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 1000))):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"{base} and its numbered sisters are all taken: name an --output_dir")


def follow_restart(args):
    """Let a run that torchrun has started again (--max_restarts) continue from its own last checkpoint.

    Its own is what was written since the launcher was started: a folder that the first start has refused is not.

    Args:
        args: common.arguments.TrainingArguments or the like; changed in place.
    Raises:
        UserError: restarts are asked for, and no folder in which they would find the run.
    """
    restart, most = parallel.restarts()
    if most and not args.output_dir:
        raise UserError("--max_restarts needs the script's --output_dir: where would a restart find the checkpoints?")
    if not restart:
        return
    folder = Path(args.output_dir)
    written = folder / ARGUMENTS
    if not written.exists() or written.stat().st_mtime < parallel.launcher_started():
        return
    args.overwrite_output_dir = False
    if complete_checkpoints(folder) or not args.resume_from_checkpoint:
        args.resume_from_checkpoint = "latest"
    if os.environ.get("RANK", "0") == "0":
        print(f"restart {restart} of {most}: --resume_from_checkpoint {args.resume_from_checkpoint}", flush=True)


def check_run_folder(args):
    """Refuse a folder that the run cannot use, before anything is loaded.

    Args:
        args: common.arguments.TrainingArguments.
    Raises:
        UserError: it holds another run or files that a run would replace, it is a file, or cannot be written to.
    """
    if not args.output_dir:
        return
    folder = Path(args.output_dir)
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: nothing can be written in {nearest}; name another folder")
    if args.overwrite_output_dir:
        return
    if holds_run(folder):
        if not args.resume_from_checkpoint:
            raise UserError(
                f"--output_dir {folder} holds another run: --resume_from_checkpoint latest continues it, "
                "--overwrite_output_dir replaces it"
            )
    elif files := sorted(path.name for path in own_files(folder)):
        raise UserError(
            f"--output_dir {folder} holds {files[0]}, which a run would replace: name a new folder, or let "
            "--overwrite_output_dir replace it"
        )


def own_files(folder):
    """The files and folders there that a run writes."""
    named = [folder / name for name in OWN_FILES if (folder / name).exists()]
    return named + [path for pattern in OWN_PATTERNS for path in folder.glob(pattern)]


def holds_run(folder):
    """Whether a run, finished or not, has been written there."""
    return any((folder / name).exists() for name in (ARGUMENTS, RESULTS, METRICS))


def is_finished(args):
    """Whether --resume_from_checkpoint latest finds a run that has reached the limits it is given."""
    results = Path(args.output_dir or ".") / RESULTS
    if args.resume_from_checkpoint != "latest" or not results.exists():
        return False
    done = json.loads(results.read_text())
    hours = [hours for hours in (args.total_training_time, args.early_exit_time_marker) if hours is not None]
    return (
        (args.max_train_steps is not None and done["train_steps"] >= args.max_train_steps)
        or (args.num_train_epochs is not None and done["epoch"] >= args.num_train_epochs)
        or (bool(hours) and done["train_runtime"] >= 3600 * min(hours))
        or (args.use_early_stopping and done["stop_reason"] == "early stopping")
    )


def open_run_folder(folder, args, settings):
    """Make the folder ready for a run that begins or continues.

    What the run replaces goes: with --overwrite_output_dir another run's files, and the leftovers of a run that is
    begun again for want of a checkpoint. Checkpoints later than the one it continues from are put aside, since
    they belong to another continuation.

    Args:
        folder: Path.
        args: common.arguments.TrainingArguments.
        settings: dict of plain values that a continued run must share with its checkpoint.
    Returns:
        Path of the checkpoint to continue from, or None.
    Raises:
        UserError: the checkpoint does not exist, is damaged, or belongs to other settings.
    """
    checkpoint = None
    if args.resume_from_checkpoint:
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, folder)
    if checkpoint is None and args.resume_from_checkpoint and (folder / RESULTS).exists():
        raise UserError(
            f"{folder} holds a finished run without a checkpoint to continue from: --model_name_or_path {folder} "
            "starts a new run from its weights, --overwrite_output_dir replaces it"
        )
    if checkpoint is not None:
        refuse_other_settings(checkpoint, settings, SAID_ON_RESUME)
    folder.mkdir(parents=True, exist_ok=True)
    for path in own_files(folder) if checkpoint is None else folder.glob("step_*.writing"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if checkpoint is not None and checkpoint.parent.resolve() == folder.resolve():
        put_later_checkpoints_aside(checkpoint)
    return checkpoint


def write_arguments(folder, facts):
    """Leave what is in force in args.json, and take away the mark of a finished run.

    Args:
        folder: Path; facts: dict of plain values and dicts of them.
    """
    (folder / RESULTS).unlink(missing_ok=True)
    (folder / ARGUMENTS).write_text(json.dumps(facts | {"commit": git_commit()}, indent=2, default=str) + "\n")


def git_commit():
    """Commit of the scripts, with "-dirty" where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
