"""The baseline of benchmarks/bench_time_to_loss.py: its fast way to compute the example's step is the true one."""

import json

import pytest
from transformers import BertForMaskedLM

from benchmarks import example_epoch, search_defaults


@pytest.fixture(scope="module")
def tokenizer(data_folder):
    return example_epoch.load_tokenizer(data_folder)


@pytest.fixture(scope="module")
def rows(data_folder, tokenizer):
    return example_epoch.load_rows(data_folder, "valid", tokenizer)


def test_both_ways_to_compute_a_step_agree(rows, tokenizer):
    checked = example_epoch.check(rows, tokenizer, 1e-3, steps=4)
    assert checked["largest_difference"] < 1e-5
    losses = [loss for loss, _ in checked["losses"]]
    assert losses[-1] < losses[0] - 0.5  # it learns at all


def test_a_run_in_pieces_is_the_whole_run(rows, tokenizer, tmp_path):
    whole, first, second = (example_epoch.Example(rows[:32], tokenizer, 1e-3) for _ in range(3))
    losses = [whole.step() for _ in range(whole.total_steps)]
    pieces = [first.step() for _ in range(2)]
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    pieces += [second.step() for _ in range(2)]
    assert pieces == losses and second.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


def test_rows_are_the_examples(data_folder, rows, tokenizer):
    lines = (data_folder / "wikitext-2/valid.txt").read_text(encoding="utf-8").splitlines()
    start = tokenizer(lines[0])["input_ids"] + tokenizer(lines[1])["input_ids"] + tokenizer(lines[2])["input_ids"]
    assert rows.shape[1] == 128 and rows.ravel()[: len(start)].tolist() == start
    assert tokenizer.convert_ids_to_tokens(start)[:2] == ["[CLS]", "[SEP]"]  # an empty line, as the example has it


@pytest.mark.slow
def test_a_trial_does_what_the_script_does(harness, data_folder, tmp_path, out):
    """The same flags: the search's model and run_pretraining.py's give the same held-out loss."""
    flags = "--num_hidden_layers 1 --hidden_size 32 --train_batch_size 4 --max_seq_length 64 --max_train_documents 300"
    flags += " --fp32 --max_eval_samples 8 --learning_rate 1e-2"
    words = [*search_defaults.wikitext_flags(data_folder, tmp_path / "cache"), *flags.split()]
    harness.run("run_pretraining.py", *words, "--max_train_steps", 20, "--output_dir", out).check()
    theirs = BertForMaskedLM.from_pretrained(out)
    trained, steps, _ = search_defaults.train(words, tokens=20 * 4 * 64)
    mine = BertForMaskedLM(trained.config)
    mine.load_state_dict(trained.state_dict())
    evaluation = example_epoch.Evaluation(data_folder, example_epoch.load_tokenizer(data_folder))
    evaluation.batches = evaluation.batches[:4]
    assert steps == 20 and evaluation(mine, masked_only=True) == pytest.approx(evaluation(theirs), abs=1e-5)


def test_the_results_of_a_search_are_json_lines():
    for line in search_defaults.RESULTS.read_text().splitlines():
        assert {"flags", "tokens", "steps", "eval_loss", "seconds_per_step", "threads"} <= json.loads(line).keys()
