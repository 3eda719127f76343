"""The folder of a run: whether a new run may be written there, whether an old one is to be continued or is done."""

import json
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

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


def prepare_run_folder(folder, overwrite, fresh):
    """Make the folder and clear what the new run replaces.

    Args:
        folder: Path.
        overwrite: remove another run's files.
        fresh: nothing is continued, so leftovers of a run without a checkpoint go too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite or fresh:
        for pattern in OWN_FILES:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / RESULTS).unlink(missing_ok=True)  # its presence says that the run is finished


def write_arguments(folder, model_args, data_args, args, facts):
    """Leave the settings in force in args.json.

    Args:
        facts: more plain values worth keeping (strategy, versions, command).
    """
    content = {"model": asdict(model_args), "data": asdict(data_args), "training": asdict(args), **facts}
    (folder / ARGUMENTS).write_text(json.dumps(content, indent=2, default=str) + "\n")


def git_commit():
    """Commit of the scripts, with "-dirty" where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
