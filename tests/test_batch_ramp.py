"""A global batch that grows: by Megatron's rule, under every cut, continued exactly."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from test_batches import CPU, make_rows, take
from test_objectives import assert_continues

from common.batch_ramp import BatchRamp
from common.data.batches import Masking, TrainBatches
from common.errors import UserError
from pretraining import fp32_copy, losses, results, small_run, training_rows

RAMP = ["--rampup_batch_size", 4, 4, 60, "--per_device_train_batch_size", 2]
SIZES = [4] * 5 + [8] * 3 + [12] * 2 + [16] * 4  # to 16; a new size after 20, 40 and 60 rows


def plain_size(consumed, start, increment, rows, final):
    """Megatron-LM's rule."""
    increments = (final - start) // increment
    return final if consumed >= rows else start + int(consumed * increments / rows) * increment


@pytest.mark.parametrize("seed", range(50))
def test_sizes_follow_megatrons_rule(seed):
    chance = np.random.default_rng(seed)
    increment, start = int(chance.integers(1, 40)), int(chance.integers(1, 100))
    growth = start, increment, int(chance.integers(1, 5000))
    final = start + increment * int(chance.integers(1, 30))
    ramp, consumed, expected = BatchRamp(final, growth), 0, []
    for step in range(500):
        assert ramp.rows_after(step) == consumed
        size = plain_size(consumed, *growth, final)
        assert ramp.at(consumed)[0] == size
        assert {ramp.steps_for(consumed + more) for more in (1, (size + 1) // 2, size)} == {step + 1}
        expected.append((consumed, size))
        consumed += size
    for step, (consumed, size) in enumerate(expected):
        same = next((n for n, (_, other) in enumerate(expected[step:]) if other != size), sys.maxsize)
        assert ramp.at(consumed) == (size, same)


def test_without_growth_every_step_is_as_large():
    ramp = BatchRamp(8)
    assert [ramp.at(rows) for rows in (0, 8, 800)] == [(8, sys.maxsize)] * 3
    assert ramp.rows_after(5) == 40 and ramp.steps_for(41) == 6


def test_batches_are_those_of_their_places(tmp_path):
    """Rows come in the same order as without a ramp; losses are divided by the weight of their own step."""
    rows = make_rows(tmp_path)
    stream = partial(TrainBatches, rows, Masking(0.15, 910, 4), 7, device=CPU)
    ramp = BatchRamp(16, (4, 4, 60))
    plain = take(stream(batch_size=2, accumulation=8, rank=0, ranks=1), 60)
    one = take(stream(batch_size=2, accumulation=8, rank=0, ranks=1, ramp=ramp), 60)
    numbers = [number for size in SIZES for number in range(size // 2)]
    assert [number for _, number, _ in one] == numbers[:60]
    for name in ("input_ids", "masked_positions", "masked_labels", "masked_weights"):
        assert all(torch.equal(mine[0][name], right[0][name]) for mine, right in zip(one, plain, strict=True))
    at = 0
    for size in SIZES[:12]:
        step = one[at : at + size // 2]
        weight = sum(batch["masked_weights"].sum() for batch, _, _ in step)
        assert all(batch["loss_denominator"] * (size // 2) == weight for batch, _, _ in step)
        assert {tokens for _, _, tokens in step} == {sum(int((b["document_ids"] > 0).sum()) for b, _, _ in step)}
        at += size // 2
    two = [take(stream(batch_size=2, accumulation=4, rank=rank, ranks=2, ramp=ramp), 30) for rank in range(2)]
    resumed = take(stream(batch_size=2, accumulation=8, rank=0, ranks=1, ramp=ramp, consumed_rows=28), 20)
    for number, (batch, _, _) in enumerate(one):
        assert torch.equal(batch["input_ids"], two[number % 2][number // 2][0]["input_ids"])
        assert batch["loss_denominator"] == two[number % 2][number // 2][0]["loss_denominator"]
    for (batch, number, _), (again, same, _) in zip(one[14:34], resumed, strict=True):
        assert torch.equal(batch["input_ids"], again["input_ids"]) and number == same


@pytest.fixture(scope="module")
def single(harness, tiny_corpus, cache, tmp_path_factory):
    """A run of 14 steps on one process."""
    out = tmp_path_factory.mktemp("ramp") / "run"
    harness.run(*command(tiny_corpus, cache, out)).check()
    return out


def command(corpus, cache, out):
    flags = [*RAMP, "--optimizer_type", "adamw", "--learning_rate", 3e-3, "--max_grad_norm", 0.2]
    flags += ["--checkpointing_steps", 1, "--save_total_limit", 99, "--hidden_dropout_prob", 0.1]
    return small_run(corpus, cache, out, *flags, steps=len(SIZES), batch=16)


def test_a_run_grows_and_continues_bit_for_bit(harness, single, tiny_corpus, cache, tmp_path):
    epochs = np.array([row["epoch"] for row in training_rows(single)])
    rows = results(single)["epoch"] / sum(SIZES)
    assert np.diff(epochs, prepend=0) / rows == pytest.approx(SIZES)
    for step in (3, 5, 9):
        words_for = partial(command, tiny_corpus, cache)
        assert_continues(harness, words_for, single, tmp_path / f"continued-{step}", step)


@pytest.mark.parametrize(
    "config",
    [
        "ddp",
        "zero2",
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("zero3", "fsdp", "tensor_parallel")),
    ],
)
def test_two_processes_equal_one(harness, single, tiny_corpus, cache, tmp_path, config):
    yaml = fp32_copy(f"accelerate_configs/{config}.yaml", tmp_path)
    for rank in harness.launch(*command(tiny_corpus, cache, tmp_path / "two"), config=yaml):
        rank.check()
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=1e-5)
    assert results(tmp_path / "two")["eval_loss"] == pytest.approx(results(single)["eval_loss"], abs=1e-5)


def test_epochs_are_counted_in_rows(harness, single, tiny_corpus, cache, out):
    words = command(tiny_corpus, cache, out)
    at = words.index("--max_train_steps")
    words[at : at + 2] = ["--num_train_epochs", results(single)["epoch"]]
    harness.run(*words).check()
    assert results(out)["train_steps"] == len(SIZES) and results(out)["epoch"] == results(single)["epoch"]


def test_what_does_not_fit_is_refused():
    for growth in ((16, 4, 60), (4, 5, 60), (0, 4, 60), (4, 0, 60), (4, 4, 0), (20, 4, 60)):
        with pytest.raises(UserError, match="does not lead to --train_batch_size 16"):
            BatchRamp(16, growth)
    assert BatchRamp(16, (4, 4, 60)).cut(2, 2) == (2, 4)
    with pytest.raises(UserError, match="a batch of 4 is not divisible by 4 rows per device x 2"):
        BatchRamp(16, (4, 4, 60)).cut(4, 2)
