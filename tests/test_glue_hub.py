"""GLUE from the hub: a folder with its layout, its columns and its labels of -1, through the same code."""

import sys

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from common.data.glue import NLI, PAIR_NLI, TASKS
from common.data.glue_splits import read_splits
from common.errors import UserError
from common.glue_arguments import parse_glue_arguments
from glue_hub import CONFIGURATIONS, hub_folder

BOTH = ("--do_train", "--do_eval")


@pytest.fixture(scope="module", params=[True, False], ids=["card", "no-card"])
def hub(request, tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / "glue", request.param)


def read(*flags):
    words = ["--model_name_or_path", "x", "--output_dir", "y", *map(str, flags)]
    _, data_args, args, _ = parse_glue_arguments(words)
    return read_splits(data_args, args)


@pytest.mark.parametrize("name", TASKS)
def test_every_configuration(hub, name):
    task, splits = read("--dataset_name", hub, "--task_name", name, *BOTH, "--do_predict")
    columns, classes = CONFIGURATIONS[name]
    assert task is TASKS[name] and len(splits.train) == 4
    assert [example.label for example in splits.train] == [
        number % (len(classes) if classes else 6) for number in range(4)
    ]
    assert splits.train[2].texts == tuple(f"train {column} 2" for column in columns)
    parts = {"": "", "_mm": ""} if name == "mnli" else {"": ""}
    assert splits.validation.keys() == parts.keys()
    assert splits.test.keys() == parts.keys() | ({"_ax"} if name == "mnli" else set())
    for suffix, examples in splits.test.items():
        assert [(example.index, example.label) for example in examples] == [(str(n), None) for n in range(10, 14)]
        part = {"_mm": "test_mismatched", "": "test_matched" if name == "mnli" else "test"}.get(suffix, "test")
        assert examples[0].texts == tuple(f"{part} {column} 0" for column in columns)
    if name == "mnli":
        assert splits.validation["_mm"][1].texts[0] == "validation_mismatched premise 1"


def test_our_classes_stand_in_the_hubs_order():
    for name, (_, classes) in CONFIGURATIONS.items():
        if name in TASKS and classes:
            ours = TASKS[name].labels
            assert ours == (classes if ours in (NLI, PAIR_NLI) else ("0", "1"))


def test_classes_in_another_order_are_known_by_their_names(tmp_path):
    folder = hub_folder(tmp_path, classes=("contradiction", "neutral", "entailment"))
    _, splits = read("--dataset_name", folder, "--task_name", "mnli", "--do_train")
    assert [TASKS["mnli"].labels[example.label] for example in splits.train[:3]] == [
        "contradiction",
        "neutral",
        "entailment",
    ]


@pytest.mark.parametrize("card", [True, False])
def test_another_folder_of_the_same_name_is_read_anew(tmp_path, card):
    """The datasets library's cache knows a folder by its name and its card."""
    for place, rows in (("a", 4), ("b", 5), ("b", 6)):
        folder = hub_folder(tmp_path / place / "glue", card, rows)
        assert len(read("--dataset_name", folder, "--task_name", "mrpc", "--do_train")[1].train) == rows


def test_a_dataset_of_ones_own(tmp_path):
    features = Features({"label": ClassLabel(names=["ham", "spam"]), "text": Value("string")})
    for name in ("train", "validation", "test"):
        rows = {"text": ["a", "b", "c"], "label": [1, 0, 1] if name != "test" else [-1] * 3}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    task, splits = read("--dataset_name", tmp_path, *BOTH, "--do_predict")
    assert task.labels == ("ham", "spam") and [example.label for example in splits.train] == [1, 0, 1]
    assert [example.index for example in splits.test[""]] == ["0", "1", "2"]
    (tmp_path / "test.parquet").rename(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 1: has no label; what has none can only be predicted"):
        read("--dataset_name", tmp_path, "--do_train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [-1, -1]}, "train, row 1: has no label; a split without labels can only be predicted"),
        ({"label": [0, 7]}, "train, row 2: label 7 is outside 0 to 1"),
        ({"sentence1": None}, r"has no column 'sentence1' \(it has sentence2, label, idx\); is it rte's"),
        ({"sentence1": [], "sentence2": [], "label": [], "idx": []}, "cannot be read .* no data"),
        ({}, r"has no split validation \(it has train\)"),
    ],
)
def test_datasets_that_do_not_fit(tmp_path, change, message):
    table = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1], "idx": [0, 1]} | change
    table = {name: values for name, values in table.items() if values is not None}
    Dataset.from_dict(table).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=message):
        read("--dataset_name", tmp_path, "--task_name", "rte", *BOTH)


def test_scores_out_of_range(tmp_path):
    table = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0.0, 5.2]}
    Dataset.from_dict(table).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="train, row 2: label 5.2 is outside 0 to 5"):
        read("--dataset_name", tmp_path, "--task_name", "stsb", "--do_train")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset_name a --data_dir b --task_name rte", "--dataset_name and files .* contradict each other"),
        ("--dataset_config_name a --task_name rte", "--dataset_config_name needs --dataset_name"),
        ("--task_name ax --do_eval", "--task_name ax has no labels: give --do_predict alone"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        read("--do_predict", *flags.split())


@pytest.mark.slow
def test_without_a_network_it_says_at_once_what_to_do(harness, tmp_path):
    flags = ["--model_name_or_path", "x", "--task_name", "mrpc", "--do_eval", "--output_dir", tmp_path / "run"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": tmp_path / "hub"}
    online = {"HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None}
    done = harness.command(sys.executable, "run_glue.py", *flags, env=nowhere | online).check(2)
    assert "dataset nyu-mll/glue (mrpc): cannot be read (Couldn't reach" in done.stderr
    assert "GLUE's own files with --data_dir" in done.stderr
    assert done.stderr.count("\n") == 1  # and so none of the hub's own attempts to try again
    assert not (tmp_path / "run").exists()
