"""Which rows a run of run_glue.py trains on, validates and predicts."""

from dataclasses import dataclass, field
from pathlib import Path

from common.data.glue import (
    AX,
    DIAGNOSTIC,
    MATCHED,
    MICROSOFT,
    Example,
    diagnostic_file,
    find_task,
    own_task,
    read_table,
    read_task_file,
    table_examples,
    task_folder,
)
from common.errors import UserError


@dataclass
class Splits:
    """Examples by split; validation and test by what is put behind a metric's name."""

    train: list[Example] | None = None
    validation: dict[str, list[Example]] = field(default_factory=dict)
    test: dict[str, list[Example]] = field(default_factory=dict)


def read_splits(data_args, args, cache_dir=None):
    """Read what the flags ask for.

    Args:
        data_args: GlueDataArguments; args: GlueTrainingArguments, for do_train, do_eval, do_predict, eval_strategy.
        cache_dir: where downloads are kept.
    Returns:
        (Task, Splits).
    Raises:
        UserError: a file that is missing or cannot be read.
    """
    wanted = {
        "train": args.do_train,
        "validation": args.do_eval or args.eval_strategy != "no",
        "test": args.do_predict,
    }
    read = _read_hub if data_args.from_hub else _read_files
    task, found = read(data_args, wanted, cache_dir)
    limits = (data_args.max_train_samples, data_args.max_eval_samples, data_args.max_predict_samples)
    for split, limit in zip(found, limits, strict=True):
        found[split] = {suffix: examples[:limit] for suffix, examples in found[split].items()}
    return task, Splits(found["train"].get(MATCHED), found["validation"], found["test"])


def _read_hub(data_args, wanted, cache_dir):
    from common.data.glue_hub import read_hub_splits

    return read_hub_splits(data_args.task_name and find_task(data_args.task_name), data_args, wanted, cache_dir)


def _read_files(data_args, wanted, cache_dir):
    if data_args.task_name:
        task = find_task(data_args.task_name)
        read = read_task_file
        files = _task_files(task, data_args)
    else:
        path = Path(data_args.train_file)
        task = own_task(read_table(path), path)
        read = lambda task, path, labelled: table_examples(task, read_table(path), path, labelled)  # noqa: E731
        files = {"train": {MATCHED: path}, "validation": {}, "test": {}}
    for split in ("train", "validation", "test"):
        if given := getattr(data_args, f"{split}_file"):
            files[split] = {MATCHED: Path(given)}
    flags = {"train": "--do_train", "validation": "--do_eval", "test": "--do_predict"}
    found = {"train": {}, "validation": {}, "test": {}}
    for split in found:
        if wanted[split] and not files[split]:
            raise UserError(f"{flags[split]} has no file: give --{split}_file, or --data_dir with --task_name")
        if wanted[split]:
            found[split] = {suffix: read(task, path, split != "test") for suffix, path in files[split].items()}
    return task, found


def absent_files(data_args, splits):
    """The files that some splits of a GLUE task would be read from and that are not there.

    Args:
        data_args: GlueDataArguments with task_name and data_dir; splits: of "train", "validation", "test".
    Returns:
        list of Path.
    """
    files = _task_files(find_task(data_args.task_name), data_args)
    return [path for split in splits for path in files[split].values() if not path.exists()]


def _task_files(task, data_args):
    if not data_args.data_dir:
        return {"train": {}, "validation": {}, "test": {}}
    folder = task_folder(task, data_args.data_dir)

    def place(name):
        plain, microsoft = folder / name, folder / MICROSOFT.get(name, name)
        return microsoft if task.name == "mrpc" and not plain.exists() and microsoft.exists() else plain

    test = {suffix: place(name) for suffix, name in task.test_files}
    if task is DIAGNOSTIC:
        test = {MATCHED: diagnostic_file(Path(data_args.data_dir)) or place("AX.tsv")}
    elif task.name == "mnli" and (beside := diagnostic_file(folder.parent)):
        test[AX] = beside
    return {
        "train": {MATCHED: place("train.tsv")},
        "validation": {suffix: place(name) for suffix, name in task.validation_files},
        "test": test,
    }
