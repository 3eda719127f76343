"""GLUE's files, tables of one's own, and the batches made of them."""

import numpy as np
import pytest
import torch

from common.data.examples import EncodedExamples, GroupedBatches, prediction_batches
from common.data.glue import (
    TASKS,
    Example,
    find_task,
    own_task,
    read_table,
    read_task_file,
    table_examples,
    task_folder,
)
from common.data.glue_splits import read_splits
from common.errors import UserError
from common.glue_arguments import parse_glue_arguments

CPU = torch.device("cpu")


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_real_files_are_read_whole(data_folder):
    sizes = {"MRPC": (3668, 408, 1725), "RTE": (2490, 277, 3000), "WNLI": (635, 71, 146)}
    for folder, expected in sizes.items():
        task = TASKS[folder.lower()]
        splits = [
            read_task_file(task, data_folder / "glue" / folder / f"{name}.tsv", name != "test")
            for name in ("train", "dev", "test")
        ]
        assert tuple(map(len, splits)) == expected
        assert all(example.label in (0, 1) for example in splits[0] + splits[1])
        assert all(example.label is None and len(example.texts) == 2 for example in splits[2])
        assert [example.index for example in splits[2]] == [str(number) for number in range(expected[2])]
    matched = read_task_file(TASKS["mnli"], data_folder / "glue/MNLI/dev_matched.tsv", True)
    assert len(matched) == 9815 and {example.label for example in matched} == {0, 1, 2}
    assert matched[0].texts == ("The new rights are nice enough", "Everyone really likes the newest benefits ")
    assert TASKS["mnli"].labels[matched[0].label] == "neutral"


def test_quotes_are_only_characters(tmp_path):
    path = write(tmp_path / "dev.tsv", "index\tsentence1\tsentence2\tlabel", '0\t"One "half\ta "" b\tentailment')
    (example,) = read_task_file(TASKS["rte"], path, True)
    assert example.texts == ('"One "half', 'a "" b') and example.label == 0


def test_microsofts_mrpc(tmp_path):
    for name in ("train", "test"):
        lines = ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r", "1\t7\t8\tA b.\tC d.\r"]
        write(tmp_path / f"msr_paraphrase_{name}.txt", *lines)
    words = f"--model_name_or_path x --task_name MRPC --data_dir {tmp_path} --output_dir y --do_train --do_eval"
    _, data_args, args, _ = parse_glue_arguments(words.split())
    _, splits = read_splits(data_args, args)
    assert splits.train[0].texts == ("A b.", "C d.") and splits.validation[""][0].label == 1 and not splits.test
    (example,) = predicted(tmp_path, "mrpc")[""]  # GLUE's test split is Microsoft's, and numbers its rows
    assert example == Example("0", ("A b.", "C d."), None)


def test_cola_has_no_header_where_it_has_labels(tmp_path):
    train = write(tmp_path / "train.tsv", "gj04\t1\t\tThey sing.", "gj04\t0\t*\tThey sings.")
    test = write(tmp_path / "test.tsv", "index\tsentence", "0\tIt rains.")
    assert [e.label for e in read_task_file(TASKS["cola"], train, True)] == [1, 0]
    assert read_task_file(TASKS["cola"], test, False)[0].texts == ("It rains.",)


def test_the_folder_is_the_root_or_the_tasks_own(tmp_path):
    (tmp_path / "mrpc").mkdir()
    assert task_folder(TASKS["mrpc"], tmp_path) == task_folder(TASKS["mrpc"], tmp_path / "mrpc") == tmp_path / "mrpc"
    with pytest.raises(UserError, match="--data_dir .*no such folder"):
        task_folder(TASKS["mrpc"], tmp_path / "absent")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["index\tsentence1\tlabel", "0\ta\tentailment"], "has no column 'sentence2'"),
        (["index\tsentence1\tsentence2", "0\ta\tb"], "has no column 'label'"),
        (["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", "1\ta\tb\tmaybe"], "line 3: label 'maybe'"),
        (["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", "1\ta"], "line 3: 2 columns instead of 4"),
        (["index\tsentence1\tsentence2\tlabel"], "holds no rows"),
    ],
)
def test_files_that_do_not_fit_are_named_with_their_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_task_file(TASKS["rte"], write(tmp_path / "dev.tsv", *lines), True)


def test_scores_out_of_range_and_unknown_tasks(tmp_path):
    path = write(tmp_path / "dev.tsv", "index\tsentence1\tsentence2\tscore", "0\ta\tb\t5.0", "1\ta\tb\t5.1")
    with pytest.raises(UserError, match=r"line 3: score '5.1' is not a number in \[0, 5\]"):
        read_task_file(TASKS["stsb"], path, True)
    with pytest.raises(UserError, match="choose one of cola, sst2, mrpc"):
        find_task("mrcp")


def test_tables_of_ones_own(tmp_path):
    csv = write(tmp_path / "a.csv", "text,label", '"He said ""no"", twice",bad', "fine,good")
    jsonl = write(
        tmp_path / "a.jsonl",
        '{"sentence1": "x", "sentence2": "y", "label": 0.5}',
        '{"sentence1": "u", "sentence2": "v", "label": 2}',
    )
    rows = read_table(csv)
    task = own_task(rows, csv)
    examples = table_examples(task, rows, csv, True)
    assert task.labels == ("bad", "good") and examples[0].texts == ('He said "no", twice',) and examples[1].label == 1
    rows = read_table(jsonl)
    task = own_task(rows, jsonl)
    assert task.labels is None and [e.label for e in table_examples(task, rows, jsonl, True)] == [0.5, 2.0]
    for text, message in (
        ("text,label\na\n", "line 2"),
        ("text\na\n", "no column 'label'"),
        ("text,label\na,x\nb,\n", "row 2: has no label; what has none can only be predicted"),
        ("label\n1\n", "no column"),
    ):
        path = tmp_path / "b.csv"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            own_task(read_table(path), path)


def encoded(number=101, seed=0):
    rng = np.random.default_rng(seed)
    ids = [np.arange(1, 1 + length) for length in rng.integers(3, 40, number)]
    return EncodedExamples(ids, None, np.arange(number), pad_id=0, length=None)


def taken(stream, number):
    return [item for item, _ in zip(stream, range(number), strict=False)]


def test_an_epoch_holds_every_example_once_in_batches_of_similar_length():
    examples = encoded(1000)
    stream = GroupedBatches(examples, 3, 4, 2, 0, 1, CPU)
    epochs = [stream.global_batches(epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches)) == list(range(1000))
    assert [len(batch) for batch in epochs[0]].count(8) == 125
    assert [batch.tolist() for batch in epochs[0]] != [batch.tolist() for batch in epochs[1]]
    padded = sum(len(batch) * examples.lengths[batch].max() for batch in epochs[0])
    assert padded < 1.15 * examples.lengths.sum()
    first = [examples.lengths[batch].mean() for batch in epochs[0]]
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.3  # long and short batches are mixed


@pytest.mark.parametrize(("batch", "accumulation", "ranks"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2)])
def test_the_cut_changes_neither_the_global_batches_nor_the_weight_of_an_example(batch, accumulation, ranks):
    examples = encoded()
    seen = {}
    for rank in range(ranks):
        stream = GroupedBatches(examples, 3, batch, accumulation, rank, ranks, CPU)
        for index, (tensors, number, _) in enumerate(taken(stream, 2 * accumulation * stream.steps_per_epoch)):
            assert number % ranks == rank and tensors["input_ids"].shape[1] % 8 == 0
            step = index // accumulation
            share = tensors["weights"] / tensors["loss_denominator"] / (accumulation * ranks)
            for label, weight in zip(tensors["labels"].tolist(), share.tolist(), strict=True):
                seen.setdefault(step, {}).setdefault(label, 0.0)
                seen[step][label] += weight
    expected = GroupedBatches(examples, 3, 8, 1, 0, 1, CPU)
    rows = [rows for epoch in (0, 1) for rows in expected.global_batches(epoch)]
    for step, weights in seen.items():
        assert weights == pytest.approx({int(row): 1 / len(rows[step]) for row in rows[step]})


def test_a_continued_stream_goes_on_where_it_was():
    whole = taken(GroupedBatches(encoded(), 3, 4, 2, 0, 1, CPU), 60)
    rest = taken(GroupedBatches(encoded(), 3, 4, 2, 0, 1, CPU, taken=17), 60 - 34)
    for (left, *_), (right, *_) in zip(whole[34:], rest, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_predictions_cover_every_example_once(ranks):
    examples = encoded(50)
    seen, calls = [], []
    for rank in range(ranks):
        batches = list(prediction_batches(examples, 8, rank, ranks, CPU))
        calls.append(len(batches))
        seen += [row for rows, batch in batches for row in rows]
        assert all((batch["labels"][: len(rows)].numpy() == rows).all() for rows, batch in batches)
    assert sorted(seen) == list(range(50)) and len(set(calls)) == 1


def test_validation_of_mnli_has_two_parts(tmp_path):
    header = "index\tsentence1\tsentence2\tgold_label"
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path / f"{name}.tsv", header, f"0\t{name}\tb\tneutral")
    words = f"--model_name_or_path x --output_dir y --task_name mnli --data_dir {tmp_path}".split()
    _, data_args, args, _ = parse_glue_arguments([*words, "--do_eval"])
    task, splits = read_splits(data_args, args)
    assert {suffix: examples[0].texts[0] for suffix, examples in splits.validation.items()} == {
        "": "dev_matched",
        "_mm": "dev_mismatched",
    }
    assert splits.train is None and task.num_labels == 3
    _, data_args, args, _ = parse_glue_arguments([*words, "--do_predict"])
    with pytest.raises(UserError, match="test_matched.tsv: No such file"):
        read_splits(data_args, args)


@pytest.mark.parametrize("place", ["AX/AX.tsv", "diagnostic/diagnostic.tsv", "ax/AX.tsv"])
def test_the_diagnostic_set_is_predicted_with_mnli_where_it_is_there(tmp_path, place):
    for path, text in ((f"MNLI/test_{part}.tsv", part) for part in ("matched", "mismatched")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write(tmp_path / path, "index\tsentence1\tsentence2", f"0\t{text}\tb")
    for data_dir in (tmp_path, tmp_path / "MNLI"):
        assert set(predicted(data_dir)) == {"", "_mm"}
    (tmp_path / place).parent.mkdir()
    write(tmp_path / place, "index\tsentence1\tsentence2", "0\tdiagnostic\tb", "1\tdiagnostic\tb")
    for data_dir in (tmp_path, tmp_path / "MNLI"):
        test = predicted(data_dir)
        assert [test[suffix][0].texts[0] for suffix in ("", "_mm", "_ax")] == ["matched", "mismatched", "diagnostic"]
    for data_dir in (tmp_path, (tmp_path / place).parent):
        assert [example.index for example in predicted(data_dir, "ax")[""]] == ["0", "1"]


def predicted(data_dir, task="mnli"):
    words = f"--model_name_or_path x --output_dir y --task_name {task} --data_dir {data_dir} --do_predict".split()
    _, data_args, args, _ = parse_glue_arguments(words)
    return read_splits(data_args, args)[1].test
