"""GLUE from the hub, or any dataset laid out as there: columns of text, 'label' (-1 for none) and 'idx'."""

from pathlib import Path

import datasets

from common.data.glue import AX, DIAGNOSTIC, MATCHED, SENTENCES, Example, own_task, table_examples
from common.data.hub import load_dataset, reading
from common.errors import UserError

GLUE = "nyu-mll/glue"  # a configuration for each task, and ax
# Where they are not called as in GLUE's own files.
TEXT_COLUMNS = {"mrpc": SENTENCES, "mnli": ("premise", "hypothesis"), "ax": ("premise", "hypothesis")}


def read_hub_splits(task, data_args, wanted, cache_dir):
    """Read splits of --dataset_name, or of the hub's GLUE.

    Args:
        task: Task, or None for the one that the training split describes.
        data_args: GlueDataArguments; wanted: {"train", "validation", "test"}: whether that split is read.
        cache_dir: where downloads are kept.
    Returns:
        (Task, {split: {suffix: list of Example}}).
    Raises:
        UserError: what cannot be reached or read, a split or column that is missing, labels that are none.
    """
    name = data_args.dataset_name or GLUE

    def load(config):
        where = f"{name} ({config})" if config else name
        remedy = (
            "check the network, --dataset_name and --dataset_config_name, or give GLUE's own files with --data_dir"
        )
        with reading(f"dataset {where}", remedy):
            return where, load_dataset(name, config, cache_dir)

    where, loaded = load(data_args.dataset_config_name or (task and task.name))
    if task is None:
        task = own_task(table_rows(split_of(loaded, "train", where), where), where)
        read = lambda split, where, labelled: table_examples(task, table_rows(split, where), where, labelled)  # noqa: E731
        names = {"train": {MATCHED: "train"}, "validation": {MATCHED: "validation"}, "test": {MATCHED: "test"}}
    else:
        read = lambda split, where, labelled: task_examples(task, split, where, labelled)  # noqa: E731
        names = {
            "train": {MATCHED: "train"},
            "validation": {suffix: hub_split(file) for suffix, file in task.validation_files},
            "test": {suffix: hub_split(file) for suffix, file in task.test_files},
        }
    found = {
        split: {
            suffix: read(split_of(loaded, part, where), f"{where}, {part}", split != "test")
            for suffix, part in names[split].items()
            if wanted[split]
        }
        for split in names
    }
    beside = name == GLUE or (Path(name) / DIAGNOSTIC.name).is_dir()
    if task.name == "mnli" and wanted["test"] and beside:
        where, loaded = load(DIAGNOSTIC.name)
        found["test"][AX] = task_examples(DIAGNOSTIC, split_of(loaded, "test", where), where, False)
    return task, found


def hub_split(file):
    """What the hub calls the split that GLUE keeps in this file."""
    return {"AX.tsv": "test"}.get(file, file.removesuffix(".tsv").replace("dev", "validation"))


def split_of(loaded, name, where):
    """A split of what load_dataset returned.

    Raises:
        UserError: it has none of this name.
    """
    if name not in loaded:
        raise UserError(f"dataset {where}: has no split {name} (it has {', '.join(loaded)}); give one that has")
    return loaded[name]


def task_examples(task, split, where, labelled):
    """The examples of a split of a GLUE task; as common.data.glue.read_task_file.

    Class numbers are the hub's, which are ours, unless the dataset names its classes as the task does, in whatever
    order.
    """
    columns = TEXT_COLUMNS.get(task.name, task.text_columns)
    missing = [name for name in (*columns, *(["label"] if labelled else [])) if name not in split.column_names]
    if missing:
        raise UserError(
            f"dataset {where}: has no column {missing[0]!r} (it has {', '.join(split.column_names)}); "
            f"is it {task.name}'s?"
        )
    texts = list(zip(*(split[name] for name in columns), strict=True))
    index = split["idx"] if "idx" in split.column_names else range(len(texts))
    labels = class_numbers(task, split, where) if labelled else [None] * len(texts)
    return [Example(str(number), text, label) for number, text, label in zip(index, texts, labels, strict=True)]


def class_numbers(task, split, where):
    """Class numbers, or scores, of a split.

    Raises:
        UserError: one is missing, or outside the task's set.
    """
    labels = split["label"]
    if task.labels is None:
        low, high = task.score_range
        return [checked(label, low, high, f"{where}, row {row}") for row, label in enumerate(labels, start=1)]
    names = getattr(split.features["label"], "names", None) or task.labels
    order = [task.labels.index(name) for name in names] if set(names) == set(task.labels) else range(len(task.labels))
    last = len(task.labels) - 1
    return [order[checked(label, 0, last, f"{where}, row {row}")] for row, label in enumerate(labels, start=1)]


def checked(label, low, high, where):
    """A label in [low, high].

    Raises:
        UserError: it lies outside; -1 says that there is none.
    """
    if label is None or label == -1:
        raise UserError(f"dataset {where}: has no label; a split without labels can only be predicted (--do_predict)")
    if not low <= label <= high:
        raise UserError(f"dataset {where}: label {label!r} is outside {low:g} to {high:g}; correct the data")
    return label


def table_rows(split, where):
    """A split as a table of one's own: list of dict of strings, classes by their names."""
    features = split.features
    names = {name: features[name].names for name in features if isinstance(features[name], datasets.ClassLabel)}

    def text(name, value):
        if value is None or (name in names and value < 0):
            return ""
        return names[name][value] if name in names else str(value)

    return [{name: text(name, value) for name, value in row.items()} for row in split]
