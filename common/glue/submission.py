"""The zip that gluebenchmark.com scores: made of the predictions of run_glue.py, and checked.

python -m common.glue.submission runs/glue [glue.zip] [--fill_missing]
python -m common.glue.submission --check glue.zip
"""

import argparse
import io
import json
import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.data.glue import AX, DIAGNOSTIC, MATCHED, MISMATCHED, TASKS, Task, find_task
from common.errors import UserError, run_main

HEADER = "index\tprediction"
RESULTS = "all_results.json"  # of a run of run_glue.py
SELECTED = "selected.json"  # of a sweep: {task: folder of its best run}
EPOCH = (1980, 1, 1, 0, 0, 0)  # equal predictions make equal zips


@dataclass(frozen=True)
class Part:
    """A file of the zip: its rows are the task's test split; `suffix` stands behind predict_results in the run."""

    name: str
    task: Task
    rows: int
    suffix: str = MATCHED


# Rows of the test files that the benchmark distributes.
PARTS = (
    Part("CoLA.tsv", TASKS["cola"], 1063),
    Part("SST-2.tsv", TASKS["sst2"], 1821),
    Part("MRPC.tsv", TASKS["mrpc"], 1725),
    Part("STS-B.tsv", TASKS["stsb"], 1379),
    Part("QQP.tsv", TASKS["qqp"], 390965),
    Part("MNLI-m.tsv", TASKS["mnli"], 9796),
    Part("MNLI-mm.tsv", TASKS["mnli"], 9847, MISMATCHED),
    Part("QNLI.tsv", TASKS["qnli"], 5463),
    Part("RTE.tsv", TASKS["rte"], 3000),
    Part("WNLI.tsv", TASKS["wnli"], 146),
    Part("AX.tsv", DIAGNOSTIC, 1104),
)


def main():
    """The command line."""
    arguments = parse_arguments()
    if arguments.check:
        check_submission(arguments.check)
        print(f"{arguments.check}: fit to hand in: {len(PARTS)} files, {sum(part.rows for part in PARTS):,} answers")
        return
    path = arguments.zip or arguments.runs / "glue.zip"
    make_submission(arguments.runs, path, arguments.fill_missing)
    print(f"{path}: checked, ready for gluebenchmark.com/submit")


def parse_arguments():
    """Read the command line."""
    parser = _Parser(prog="make_glue_submission.sh", allow_abbrev=False, description="Make or check a GLUE zip.")
    parser.add_argument(
        "runs", type=Path, nargs="?", help=f"A sweep's folder, or one whose subfolders hold {RESULTS}."
    )
    parser.add_argument("zip", type=Path, nargs="?", help="What is written (default: glue.zip in that folder).")
    parser.add_argument("--fill_missing", action="store_true", help="Answer tasks without a run without a look.")
    parser.add_argument("--check", type=Path, metavar="ZIP", help="Check this zip instead.")
    arguments = parser.parse_args()
    if bool(arguments.check) == bool(arguments.runs):
        raise UserError("give a folder of runs, or --check and a zip")
    return arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the arguments")


def make_submission(runs, path, fill_missing=False):
    """Write the zip of a folder of runs, whole or not at all.

    Args:
        runs: Path, as find_runs takes; path: Path of the zip, which is replaced.
        fill_missing: answer a task without predictions by a rule that does not look at it, and say so.
    Raises:
        UserError: a task without predictions, predictions that do not fit.
    """
    folders = find_runs(runs, may_be_none=fill_missing)
    if not path.parent.is_dir():
        raise UserError(f"{path}: its folder does not exist; make it, or name another zip")
    sources = {part: predictions_of(part, folders) for part in PARTS}
    missing = [part for part in PARTS if not sources[part]]
    names = ", ".join(part.name.removesuffix(".tsv") for part in missing)
    if missing and not fill_missing:
        raise UserError(
            f"{runs}: no predictions for {names}: run_glue.py --do_predict writes them (AX: with MNLI, where the "
            "diagnostic set is beside it); --fill_missing answers them without a look"
        )
    contents = {part.name: part_of_run(part, source) for part, source in sources.items() if source}
    contents |= {part.name: table(placeholder(part)) for part in missing}
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(zip_bytes(contents))
        check_submission(temporary, shown=path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if missing:
        print(f"without a look at the task, and so without worth: {names}")


def find_runs(folder, may_be_none=False):
    """The run of each task: {task name: Path}.

    Args:
        folder: Path with a selected.json, or whose subfolders are output folders of run_glue.py.
        may_be_none: whether {} is an answer.
    Raises:
        UserError: no such folder or no runs, a selected.json that is not one, several runs of a task.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the runs")
    if (folder / SELECTED).exists():
        found = read_json(folder / SELECTED)
        runs = {find_task(name).name: folder / str(place) for name, place in found.items()}
        lost = [path for path in runs.values() if not path.is_dir()]
        if lost:
            raise UserError(f"{folder / SELECTED}: {lost[0]} is no folder; correct the file")
    else:
        runs = {}
        for path in sorted(path.parent for path in folder.glob(f"*/{RESULTS}")):
            task = read_json(path / RESULTS).get("task")
            if task not in {*TASKS, DIAGNOSTIC.name}:
                continue  # a task of one's own
            if task in runs:
                raise UserError(f"{runs[task]} and {path} are both runs of {task}: keep one, or name it in {SELECTED}")
            runs[task] = path
    if not runs and not may_be_none:
        raise UserError(f"{folder}: holds no runs of run_glue.py; give the folder above their output folders")
    return runs


def read_json(path):
    """The object in a JSON file.

    Raises:
        UserError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; correct or remove it")
    return found


def predictions_of(part, folders):
    """Path of the predictions for a part, or None. The diagnostic set has a run of its own, or is MNLI's third."""
    for task, suffix in ((part.task.name, part.suffix), *([("mnli", AX)] if part.task is DIAGNOSTIC else [])):
        path = folders[task] / f"predict_results{suffix}.tsv" if task in folders else None
        if path and path.exists():
            return path
    return None


def part_of_run(part, source):
    """A file of the zip, as bytes, of a run's predictions.

    Raises:
        UserError: they are not what the benchmark wants.
    """
    content = table([answer_row(part, *row) for row in read_predictions(source)])
    fault = file_fault(part, content)
    if fault:
        raise UserError(f"{source} {fault}: let run_glue.py --do_predict write it again, for the whole test split")
    return content


def read_predictions(path):
    """Rows of a predict_results.tsv: list of (index, prediction).

    Raises:
        UserError: not such a file.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [tuple(line.split("\t")) for line in lines]
    if not lines or lines[0] != HEADER or any(len(row) != 2 for row in rows):
        raise UserError(f"{path}: not a table of index and prediction: let run_glue.py --do_predict write it again")
    return rows[1:]


def answer_row(part, index, prediction):
    """A row as the benchmark wants it: (index, answer). Scores are cut to the task's range; file_fault judges."""
    score = None if part.task.labels else as_score(prediction)
    if score is None:
        return index, prediction
    low, high = part.task.score_range
    return index, f"{min(high, max(low, score)):.3f}"


def as_score(text):
    """A number that text stands for; None for anything else, NaN included."""
    try:
        score = float(text)
    except ValueError:
        return None
    return None if math.isnan(score) else score


def placeholder(part):
    """Rows for a task without predictions: the first class, or scores that rise evenly, since no correlation with a
    constant is defined."""
    if part.task.labels:
        return [(str(index), part.task.labels[0]) for index in range(part.rows)]
    low, high = part.task.score_range
    step = (high - low) / (part.rows - 1)
    return [(str(index), f"{low + step * index:.3f}") for index in range(part.rows)]


def table(rows):
    """A file of the zip, as bytes; rows in the order of their numbers."""
    rows = sorted(rows, key=lambda row: (len(row[0]), row[0]))
    return "".join(f"{line}\n" for line in (HEADER, *map("\t".join, rows))).encode()


def zip_bytes(contents):
    """The zip of {file name: bytes}, as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for part in PARTS:
            archive.writestr(zipfile.ZipInfo(part.name, EPOCH), contents[part.name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def check_submission(path, shown=None):
    """Judge a zip before the benchmark's server does.

    Args:
        path: Path; shown: its name in messages, where it has yet to get it.
    Raises:
        UserError: it is not exactly what the server wants; with every file's first fault.
    """
    shown = shown or path
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            contents = {part.name: archive.read(part.name) for part in PARTS if part.name in names}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last one: encrypted
        raise UserError(f"{shown}: not a whole zip ({error}); make it again") from error
    expected = {part.name for part in PARTS}
    faults = [f"{name} does not belong there" for name in sorted(set(names) - expected)]
    faults += [f"{name} is there more than once" for name in sorted(expected) if names.count(name) > 1]
    for part in PARTS:
        fault = file_fault(part, contents[part.name]) if part.name in contents else "is missing"
        faults += [f"{part.name} {fault}"] if fault else []
    if faults:
        raise UserError(f"{shown}: {'; '.join(faults)}; correct the runs and make it again")


def file_fault(part, content):
    """The first fault of a file in the zip, or None.

    Args:
        part: Part; content: bytes.
    """
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    if lines[-1] == "":
        lines.pop()
    if not lines or lines[0] != HEADER:
        return "does not begin with the header 'index<tab>prediction'"
    if len(lines) - 1 != part.rows:
        return f"has {len(lines) - 1:,} rows instead of {part.rows:,}"
    indices = [str(index) for index in range(part.rows)]
    awaited = set(indices)
    for number, line in enumerate(lines[1:], start=2):
        index, tab, answer = line.partition("\t")
        if not tab:
            return f"line {number} has one column instead of two"
        if index not in awaited:
            wrong = "is there for the second time" if index in indices else f"is none of 0 to {part.rows - 1:,}"
            return f"line {number}: index {index!r} {wrong}"
        awaited.remove(index)
        fault = answer_fault(part, answer)
        if fault:
            return f"line {number}: {fault}"
    return None


def answer_fault(part, answer):
    """What is wrong with an answer, or None."""
    if part.task.labels:
        return None if answer in part.task.labels else f"{answer!r} is none of {', '.join(part.task.labels)}"
    low, high = part.task.score_range
    score = as_score(answer)
    fits = score is not None and low <= score <= high
    return None if fits else f"{answer!r} is not a score from {low:g} to {high:g}"


if __name__ == "__main__":
    run_main(main)
