"""Checkpoints of a run in training: whole or absent, verified before they are used, the oldest removed.

A checkpoint is a folder `step_N` in the run's folder. It is written beside its place, flushed to disk and renamed, and
its manifest lists every file with size and checksum; a folder without a fitting manifest is never chosen.
"""

import json
import re
import shutil
from pathlib import Path

from common.errors import UserError, first_line
from common.files import crc32, flush
from common.parallel import on_main
from common.resume import saved_settings

MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step_(\d+)")
_WRITING = ".writing"


def save_checkpoint(accelerator, run_folder, step, write_files, state, keep):
    """Write `step_N` and drop the oldest beyond `keep`. Every process calls it.

    Args:
        accelerator: for its main process and its barriers.
        run_folder: Path, on a file system that all processes see.
        step: int, completed optimizer steps.
        write_files: function of a folder, called by every process: weights and optimizer state. Where a file cannot
            be written, it raises UserError on all of them.
        state: plain values, written as JSON: whatever else a resumed run must know.
        keep: int, complete checkpoints to keep.
    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    final = Path(run_folder) / f"step_{step}"
    temporary = final.with_name(final.name + _WRITING)

    def make_room():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def complete():
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        _seal(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        flush(final.parent)
        for old in complete_checkpoints(run_folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)

    on_main(accelerator, lambda: _named(final, make_room))
    _named(final, lambda: write_files(temporary))
    on_main(accelerator, lambda: _named(final, complete))


def _named(final, write):
    """Do a part of the writing; where it fails, leave nothing half-written and say which checkpoint it was."""
    try:
        write()
    except (OSError, UserError) as error:
        shutil.rmtree(final.with_name(final.name + _WRITING), ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {final}: {first_line(error)}; earlier "
            "checkpoints are intact; free space and continue with --resume_from_checkpoint latest"
        ) from error


def complete_checkpoints(run_folder):
    """The checkpoints of a run that were written to their end, newest first; their files are not verified."""
    found = {int(m[1]): p for p in Path(run_folder).glob("step_*") if (m := _NAME.fullmatch(p.name))}
    return [found[step] for step in sorted(found, reverse=True) if (found[step] / MANIFEST).exists()]


def latest_checkpoint(run_folder):
    """The newest checkpoint whose files fit their checksums, or None."""
    return next((path for path in complete_checkpoints(run_folder) if not damage(path)), None)


def put_later_checkpoints_aside(checkpoint):
    """Rename the checkpoints beside this one that are later: `latest` no longer finds them, nothing is lost."""
    for later in complete_checkpoints(checkpoint.parent):
        if _step(later) > _step(checkpoint):
            aside = later.with_name(later.name + ".superseded")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)


def _step(path):
    return int(_NAME.fullmatch(path.name)[1])


def damage(path):
    """What is wrong with a checkpoint, in a few words; None when it is whole."""
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "it has no readable manifest"
    for name, expected in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"] or crc32(file) != expected["crc32"]:
            return f"{name} differs from its checksum"
    return None


def resolve_checkpoint(asked, run_folder):
    """The checkpoint that --resume_from_checkpoint means.

    Args:
        asked: "latest" or a path.
        run_folder: Path of the run.
    Returns:
        Path, or None where "latest" finds none.
    Raises:
        UserError: a path that is not a complete checkpoint.
    """
    if asked == "latest":
        return latest_checkpoint(run_folder)
    path = Path(asked)
    if not path.is_dir():
        raise UserError(f"--resume_from_checkpoint {asked} does not exist: give a step_N folder, or latest")
    if fault := damage(path):
        raise UserError(f"--resume_from_checkpoint {asked} cannot be used: {fault}; give another, or latest")
    return path


def read_state(path):
    """The values that save_checkpoint was given as `state`."""
    return json.loads((path / STATE).read_text())


def refuse_other_settings(path, settings, may_change):
    """Raise UserError where a checkpoint belongs to a run with other settings.

    Args:
        path: the checkpoint; settings: common.resume.Settings, or a dict of plain values.
        may_change: names of settings that may differ.
    """
    before = saved_settings(read_state(path)["settings"], settings)
    different = [name for name in settings if name not in may_change and before.get(name) != settings[name]]
    if different:
        pairs = ", ".join(f"{name} {before.get(name)} (now {settings[name]})" for name in different[:4])
        raise UserError(f"{path} is of another configuration: {pairs}; use the same, or another --output_dir")


def _seal(folder):
    """Flush every file and list it in the manifest."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush(file)
        files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "crc32": crc32(file)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    flush(folder / MANIFEST)
    flush(folder)
