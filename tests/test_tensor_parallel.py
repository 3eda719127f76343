"""Tensor parallelism beyond what every YAML is tested for in test_strategies.py and test_strategies_resume.py."""

import json

import pytest

from causal import causal_run
from harness import TESTS
from pretraining import fp32_copy, losses, results, small_run, training_rows

CONFIG = "accelerate_configs/tensor_parallel.yaml"
BATCH = ["--per_device_train_batch_size", 4, "--learning_rate", 3e-3, "--max_grad_norm", 0.2]
BATCH += ["--optimizer_type", "adamw"]


def launch(harness, tmp_path, words, processes=None):
    """Run the ranks of a YAML to their end, which must be a good one. Returns: what each has printed."""
    ranks = harness.launch(*words, config=fp32_copy(CONFIG, tmp_path), num_processes=processes)
    return [rank.check().stdout for rank in ranks]


def refused(harness, tmp_path, words, says):
    """Assert that all ranks end with one line of error, that of the first."""
    ranks = harness.launch(*words, config=fp32_copy(CONFIG, tmp_path), num_processes=None)
    assert {rank.returncode for rank in ranks} == {2}
    assert says in ranks[0].stderr and ranks[0].stderr.count("error: ") == 1
    assert not any("Traceback" in rank.stderr for rank in ranks)


def test_heads_of_different_ranks_drop_different_weights(harness, tmp_path):
    ranks = [
        json.loads(printed.splitlines()[-1]) for printed in launch(harness, tmp_path, [TESTS / "attention_dropout.py"])
    ]
    masks = [tuple(layer) for rank in ranks for layer in rank["kept"]]
    assert len(masks) == len(set(masks)) == 4, "two heads or two layers drop the same"
    assert all(len(set(mask)) > 1 for mask in masks), "nothing was dropped"
    assert ranks[0]["hidden"] == ranks[1]["hidden"]


def test_what_no_slice_cuts_drops_what_one_process_drops(harness, tiny_corpus, cache, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    flags = [*BATCH, "--hidden_dropout_prob", 0.1]
    one, two = (small_run(tiny_corpus, cache, out, *flags, steps=6) for out in outs)
    harness.run(*one).check()
    launch(harness, tmp_path, two)
    assert losses(outs[1]) == pytest.approx(losses(outs[0]), abs=1e-5)


@pytest.mark.exhaustive
def test_groups_of_slices_share_the_rows(harness, tiny_corpus, cache, tmp_path):
    """2 x 2 processes, without cutting anything else."""
    one, four = tmp_path / "one", tmp_path / "four"
    harness.run(*small_run(tiny_corpus, cache, one, *BATCH, steps=20, batch=16)).check()
    words = small_run(tiny_corpus, cache, four, *BATCH, steps=20, batch=16)
    printed = launch(harness, tmp_path, words, processes=4)[0]
    assert "tensor parallel, layers in 2 slices, 2 copies, 4 process(es)" in printed and "2 accumulation" in printed
    assert losses(four) == pytest.approx(losses(one), abs=1e-5)
    norms = [[row["grad_norm"] for row in training_rows(out)] for out in (four, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and min(norms[1]) > 0.2
    assert results(four)["eval_loss"] == pytest.approx(results(one)["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--num_attention_heads", 1], "the model's 1 attention heads cannot be cut in 2 equal slices"),
        (["--intermediate_size", 65], "the model's 65 feed-forward columns cannot be cut in 2 equal slices"),
    ],
)
def test_a_shape_that_cannot_be_cut_is_refused(harness, tiny_corpus, cache, tmp_path, flags, says):
    words = small_run(tiny_corpus, cache, tmp_path / "out", *flags, steps=1)
    refused(harness, tmp_path, words, says)


def test_a_family_without_a_plan_is_refused(harness, tiny_corpus, cache, tmp_path):
    shape = "n_embd=32,n_layer=2,n_head=2,n_positions=128"
    words = causal_run(tiny_corpus, cache, tmp_path / "out", "--model_type", "gpt2", steps=1, overrides=shape)
    says = "a gpt2 has no plan for tensor parallelism; known are bert, megatron-bert, roberta, opt"
    refused(harness, tmp_path, words, says)


@pytest.mark.parametrize(
    "role, world, says",
    [
        ("tensor_parallel size=2", 3, "1 copies x 1 shards x 2 slices"),
        ("tensor_parallel", 2, "it is written 'tensor_parallel size=N'"),
        ("tensor_parallel size=two", 2, "it is written 'tensor_parallel size=N'"),
        ("tensor_parallel size=2 size=2", 2, "it is written 'tensor_parallel size=N'"),
        ("cpu size=2", 2, "it is written 'cpu'"),
    ],
)
def test_a_role_that_does_not_fit_is_refused(harness, tiny_corpus, cache, out, role, world, says):
    environment = {"ROLE_NAME": role, "WORLD_SIZE": world, "RANK": 0}
    result = harness.run(*small_run(tiny_corpus, cache, out, steps=1), env=environment).check(2)
    assert says in result.stderr and result.stderr.count("error: ") == 1 and not out.exists()


def test_slices_and_fsdp_by_the_wrong_key_are_refused(harness, tiny_corpus, cache, out):
    environment = {"ROLE_NAME": "tensor_parallel size=2", "WORLD_SIZE": 2, "ACCELERATE_USE_FSDP": "true"}
    result = harness.run(*small_run(tiny_corpus, cache, out, steps=1), env=environment).check(2)
    assert "parallelism_config_tp_size" in result.stderr and not out.exists()


def test_the_check_before_a_launch_refuses_the_same(harness, tiny_corpus, cache, out):
    environment = {"ROLE_NAME": "tensor_parallel size=4", "WORLD_SIZE": 4}
    words = [*small_run(tiny_corpus, cache, out, steps=1), "--check_arguments"]
    assert "2 attention heads cannot be cut in 4" in harness.run(*words, env=environment).check(2).stderr
