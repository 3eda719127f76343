"""The GLUE tasks and their files: GLUE's own TSV layout, Microsoft's MRPC, the hub, or a table of one's own.

A split is a list of Example. Nothing here knows tokenizers or models.
"""

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError

NLI = ("entailment", "neutral", "contradiction")
PAIR_NLI = ("entailment", "not_entailment")
ZERO_ONE = ("0", "1")
SENTENCES = ("sentence1", "sentence2")
MATCHED, MISMATCHED, AX = "", "_mm", "_ax"  # behind the names of metrics and of files


@dataclass(frozen=True)
class Example:
    """One row of a split.

    index: as the file gives it, or the row's number. label: class number, score, or None where the file has none.
    """

    index: str
    texts: tuple[str, ...]
    label: int | float | None


@dataclass(frozen=True)
class Task:
    """A task: what its columns are called in GLUE's files, its classes in the order of their numbers, its metrics.

    labels: None for a score in score_range. validation_files, test_files: by what is put behind a metric's name.
    """

    name: str
    folder: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    validation_files: tuple[tuple[str, str], ...] = ((MATCHED, "dev.tsv"),)
    test_files: tuple[tuple[str, str], ...] = ((MATCHED, "test.tsv"),)
    score_range: tuple[float, float] = (0.0, 5.0)

    @property
    def num_labels(self):
        """Outputs of the head."""
        return len(self.labels) if self.labels else 1


TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence",), "label", ZERO_ONE, ("matthews_correlation",)),
        Task("sst2", "SST-2", ("sentence",), "label", ZERO_ONE, ("accuracy",)),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", ZERO_ONE, ("f1", "accuracy")),
        Task("stsb", "STS-B", SENTENCES, "score", None, ("pearson", "spearmanr")),
        Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", ZERO_ONE, ("f1", "accuracy")),
        Task(
            "mnli",
            "MNLI",
            SENTENCES,
            "gold_label",
            NLI,
            ("accuracy",),
            ((MATCHED, "dev_matched.tsv"), (MISMATCHED, "dev_mismatched.tsv")),
            ((MATCHED, "test_matched.tsv"), (MISMATCHED, "test_mismatched.tsv")),
        ),
        Task("qnli", "QNLI", ("question", "sentence"), "label", PAIR_NLI, ("accuracy",)),
        Task("rte", "RTE", SENTENCES, "label", PAIR_NLI, ("accuracy",)),
        Task("wnli", "WNLI", SENTENCES, "label", ZERO_ONE, ("accuracy",)),
    )
}
# GLUE's diagnostic set, which has no labels: answered by a model of MNLI.
DIAGNOSTIC = Task("ax", "AX", SENTENCES, "label", NLI, (), (), ((MATCHED, "AX.tsv"),))
COLA_COLUMNS = ["source", "label", "mark", "sentence"]  # its training and validation files have no header
# GLUE's development split is a part of Microsoft's training split, and Microsoft's test split is GLUE's.
MICROSOFT = {
    "train.tsv": "msr_paraphrase_train.txt",
    "dev.tsv": "msr_paraphrase_test.txt",
    "test.tsv": "msr_paraphrase_test.txt",
}


def find_task(name):
    """The task with this name.

    Raises:
        UserError: no such task.
    """
    known = TASKS | {DIAGNOSTIC.name: DIAGNOSTIC}
    if name.lower() not in known:
        raise UserError(f"--task_name {name} is unknown: choose one of {', '.join(known)}")
    return known[name.lower()]


def task_folder(task, data_dir):
    """The folder of a task's files: below the GLUE root, or the folder itself.

    Raises:
        UserError: no such folder.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data_dir {root}: no such folder; give the GLUE root, or the task's own folder")
    below = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    return below.get(task.folder.lower(), root)


def diagnostic_file(folder):
    """GLUE's diagnostic set in a folder, or in the AX or diagnostic folder below it; None where there is none."""
    below = [path for path in sorted(folder.iterdir()) if path.name.lower() in ("ax", "diagnostic") and path.is_dir()]
    places = (place / name for place in (folder, *below) for name in ("AX.tsv", "diagnostic.tsv"))
    return next((path for path in places if path.exists()), None)


def read_task_file(task, path, labelled):
    """Read a file in GLUE's layout, without regard to quotes.

    Args:
        task: Task; path: Path; labelled: whether every row must have its label.
    Returns:
        list of Example.
    Raises:
        UserError: a file that cannot be read, a column that is missing, a row that is cut short, a label outside the
            task's set; with the line.
    """
    lines = _lines(path)
    header = lines[0].split("\t")
    first = 1
    if task.name == "cola" and "sentence" not in header:
        header, first = COLA_COLUMNS, 0
    missing = [name for name in task.text_columns if name not in header]
    if labelled and task.label_column not in header:
        missing.append(task.label_column)
    if missing:
        raise UserError(
            f"{path}: has no column {missing[0]!r} (it has {', '.join(header)}); is it {task.name}'s file?"
        )
    columns = [header.index(name) for name in task.text_columns]
    label = header.index(task.label_column) if labelled else None
    index = header.index("index") if "index" in header else None
    needed = max([*columns, *(column for column in (label, index) if column is not None)])
    examples = []
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line:
            continue
        cells = line.split("\t")
        where = f"{path}, line {number}"
        if len(cells) <= needed:
            raise UserError(f"{where}: {len(cells)} columns instead of {len(header)}; correct the file")
        value = None if label is None else parse_label(task, cells[label], where)
        name = str(len(examples)) if index is None else cells[index]
        examples.append(Example(name, tuple(cells[column] for column in columns), value))
    if not examples:
        raise UserError(f"{path}: holds no rows; give a file with some")
    return examples


def parse_label(task, text, where):
    """The class number or the score that a label in a file means.

    Raises:
        UserError: it is none of the task's.
    """
    if task.labels is None:
        low, high = task.score_range
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not low <= score <= high:
            raise UserError(f"{where}: score {text!r} is not a number in [{low:g}, {high:g}]; correct the file")
        return score
    if text not in task.labels:
        raise UserError(f"{where}: label {text!r} is none of {', '.join(task.labels)}; correct the file")
    return task.labels.index(text)


def read_table(path):
    """Read a table of one's own: csv (quotes count), tsv (they do not), json lines.

    Returns:
        list of dict of strings, a row each.
    Raises:
        UserError: a file that cannot be read, an unknown kind of file.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".json", ".jsonl"):
        raise UserError(f"{path}: unknown kind of table; give .csv, .tsv or .jsonl")
    lines = _lines(path)
    if kind in (".json", ".jsonl"):
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
                row = {name: "" if value is None else str(value) for name, value in row.items()}
                rows += [row] if row else []
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: not a JSON object; correct the file") from error
    else:
        quoting = csv.QUOTE_MINIMAL if kind == ".csv" else csv.QUOTE_NONE
        reader = csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t", quoting=quoting)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: not as many columns as the header; correct the file")
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no rows; give a file with some")
    return rows


def own_task(rows, where, is_regression=None):
    """The task that a table of one's own describes, by the rules of Hugging Face's example: the label stands in the
    column "label"; the texts in "sentence1" and "sentence2", or else in the first one or two other columns.

    Args:
        rows: of read_table, of the training file; where: its name; is_regression: None = where labels have fractions.
    Raises:
        UserError: no label, or no text.
    """
    names = list(rows[0])
    if "label" not in names:
        raise UserError(f"{where}: has no column 'label' (it has {', '.join(names)}); name it so")
    others = [name for name in names if name not in ("label", "index", "idx", "id")]
    columns = tuple(name for name in SENTENCES if name in others) or tuple(others[:2])
    if not columns:
        raise UserError(f"{where}: has no column of text beside 'label'; give sentence1 and, for pairs, sentence2")
    values = {row["label"] for row in rows}
    if "" in values:
        number = next(number for number, row in enumerate(rows, start=1) if not row["label"])
        raise UserError(f"{where}, row {number}: has no label; what has none can only be predicted (--test_file)")
    if is_regression is None:
        is_regression = all(_is_number(value) for value in values) and any("." in value for value in values)
    if is_regression:
        task = Task("own", "", columns, "label", None, ("pearson", "spearmanr"))
        return replace(task, score_range=(-math.inf, math.inf))
    metrics = ("f1", "accuracy") if len(values) == 2 else ("accuracy",)
    return Task("own", "", columns, "label", tuple(sorted(values)), metrics)


def table_examples(task, rows, path, labelled):
    """The examples of a table's rows; as read_task_file."""
    missing = [name for name in (*task.text_columns, *(["label"] if labelled else [])) if name not in rows[0]]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]!r}, which the training file has; add it")
    return [
        Example(
            row.get("index", row.get("idx", row.get("id", str(number)))),
            tuple(row[column] for column in task.text_columns),
            parse_label(task, row["label"], f"{path}, row {number + 1}") if labelled else None,
        )
        for number, row in enumerate(rows)
    ]


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _lines(path):
    try:
        text = path.read_text(encoding="utf-8-sig")  # Microsoft's files begin with a byte order mark
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check --data_dir, --train_file, --validation_file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; convert it") from error
    return [line.removesuffix("\r") for line in text.split("\n")]
