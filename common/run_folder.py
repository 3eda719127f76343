"""The folder of a run: whether a new run may be written there, whether an old one is to be continued or is done."""

import json
import shutil
import subprocess
import time
from pathlib import Path

from common.checkpoint import refuse_other_settings, resolve_checkpoint
from common.errors import UserError

ARGUMENTS, RESULTS, METRICS, READINGS = "args.json", "all_results.json", "metrics.jsonl", "clock.f64"
LIMITS = ("total_training_time", "early_exit_time_marker", "max_train_steps", "num_train_epochs")
# What a run writes, and so what --overwrite_output_dir may remove; anything else in the folder is left alone.
OWN_FILES = (ARGUMENTS, RESULTS, METRICS, READINGS, "curves.png", "README.md", "config.json", "model.safetensors*")
OWN_FILES += ("tokenizer*", "vocab.txt", "special_tokens_map.json", "step_*", "marker_*", "tracker")


def new_run_name():
    """runs/<time>, in the local time zone, to the second."""
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def check_run_folder(args):
    """Refuse a folder that the run cannot use, before anything is loaded.

    Args:
        args: common.arguments.TrainingArguments.
    Raises:
        UserError: it holds another run, it is a file, or nothing can be written there.
    """
    if not args.output_dir:
        return
    folder = Path(args.output_dir)
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {folder}: {nearest} is a file; name a folder")
    if holds_run(folder) and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise UserError(
            f"--output_dir {folder} holds another run: --resume_from_checkpoint latest continues it, "
            "--overwrite_output_dir replaces it"
        )


def holds_run(folder):
    """Whether a run, finished or not, has been written there."""
    return any((Path(folder) / name).exists() for name in (ARGUMENTS, RESULTS, METRICS))


def is_finished(args):
    """Whether the run to be resumed has reached these limits already."""
    folder = Path(args.output_dir or ".")
    if not args.resume_from_checkpoint or not args.output_dir or not (folder / RESULTS).exists():
        return False
    before = json.loads((folder / ARGUMENTS).read_text())["training"]
    return all(before[name] == getattr(args, name) for name in LIMITS)


def open_run_folder(folder, args, settings, facts):
    """Make the folder ready for a run that begins or continues, and leave its settings in args.json.

    What the run replaces goes: with --overwrite_output_dir another run's files, and the leftovers of a run that is
    begun again for want of a checkpoint.

    Args:
        folder: Path.
        args: common.arguments.TrainingArguments.
        settings: dict of plain values that a continued run must share with its checkpoint.
        facts: dict of what to write down.
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
        refuse_other_settings(checkpoint, settings)
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in OWN_FILES if checkpoint is None else ():
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / RESULTS).unlink(missing_ok=True)  # its presence says that the run is finished
    (folder / ARGUMENTS).write_text(json.dumps(facts | {"commit": git_commit()}, indent=2, default=str) + "\n")
    return checkpoint


def git_commit():
    """Commit of the scripts, with "-dirty" where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
