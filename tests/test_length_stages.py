"""Rows that grow in the course of a run: equal to two runs by hand, under every cut, continued exactly."""

import json
import shutil
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from test_batches import CPU, take
from test_memory import MASKED
from test_objectives import assert_continues
from test_resume import change_state

from common.data.batches import Masking, TrainBatches
from common.data.packing import DocumentRows, Frame
from common.errors import UserError
from common.length_stages import Stage, parse_stages, refuse_empty_stages
from common.memory import Workload, estimate
from common.report import read_metrics
from plain import TOKENIZER, token_file
from pretraining import fp32_copy, losses, results, small_run, training_rows, weights

STAGES = ["--max_seq_length_stages", "16:0.6,64:0.4", "--per_device_train_batch_size", 2]
STEPS, SWITCH = 15, 9  # 9/15, which is a little above 0.6 where floating-point numbers are added
RECIPE = ["--optimizer_type", "adamw", "--learning_rate", 3e-3, "--max_grad_norm", 0.2, "--hidden_dropout_prob", 0.1]
RECIPE += ["--checkpointing_steps", 1, "--save_total_limit", 99]


def test_what_the_flag_means():
    assert parse_stages("128:0.9,512:0.1") == [Stage(128, Fraction(9, 10)), Stage(512, Fraction(1))]
    thirds = parse_stages("64:1/3,128:1/3,256:1/3")
    assert [(stage.length, stage.end) for stage in thirds] == [(64, Fraction(1, 3)), (128, Fraction(2, 3)), (256, 1)]
    assert float(parse_stages("64:0.1,128:0.2,256:0.7")[1].end) == 0.3 != 0.1 + 0.2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("128", "give lengths that grow"),
        ("128:1", "give lengths that grow"),
        ("512:0.5,128:0.5", "give lengths that grow"),
        ("128:0.5,128:0.5", "give lengths that grow"),
        ("4:0.5,8:0.5", "give lengths that grow"),
        ("128:x,512:0.1", "give lengths that grow"),
        ("128:1/0,512:0.1", "give lengths that grow"),
        ("128:0.9,512:0.2", "the shares must be above 0 and 1 together; they are 1.1"),
        ("128:1.5,512:-0.5", "the shares must be above 0"),
        ("96:0.9,512:0.1", "512 is no multiple of 96"),
    ],
)
def test_what_it_cannot_mean_is_refused(text, said):
    with pytest.raises(UserError) as refusal:
        parse_stages(text)
    assert said in str(refusal.value) and text in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("steps", range(1, 40))
def test_a_stage_without_a_step_is_refused(steps):
    stages = parse_stages("64:0.05,128:0.9,256:0.05")
    lengths = [next(stage.length for stage in stages if Fraction(done, steps) < stage.end) for done in range(steps)]
    if len(set(lengths)) == 3:
        refuse_empty_stages(stages, steps)
    else:
        absent = min({64, 128, 256} - set(lengths))
        with pytest.raises(UserError, match=f"--max_train_steps {steps} leaves no step for rows of {absent} tokens"):
            refuse_empty_stages(stages, steps)


def make_rows(tmp_path, seq_length):
    file = token_file(np.random.default_rng(0).integers(1, 90, 300))
    file.tokens = (file.tokens % 900 + 10).astype(np.uint16)
    return DocumentRows(file, Frame.for_masked(TOKENIZER), seq_length, tmp_path)


def begin(stream, consumed_rows, progress):
    assert stream.next_step(consumed_rows, progress) == (8, 4 // stream.ranks)
    return stream


def test_batches_are_those_of_rows_of_one_length(tmp_path):
    """At every place, in both stages, those that a run of this length alone would have there."""
    short, long = make_rows(tmp_path, 16), make_rows(tmp_path, 64)
    masking = Masking(0.3, 910, 4, 0.15)
    plain = partial(TrainBatches, objective=masking, seed=7, rank=0, ranks=1, device=CPU)
    alone = take(plain(short, batch_size=8, accumulation=4, total_rows=4 * 80), 24)
    alone += take(plain(long, batch_size=2, accumulation=4, total_rows=80, consumed_rows=6 * 8), 16)
    for ranks in (1, 2):
        staged = partial(TrainBatches, long, masking, 7, 2, 4 // ranks, ranks=ranks, device=CPU, total_rows=80)
        for rank in range(ranks):
            stream = begin(staged(rank=rank, shorter=[(0.6, short)]), 0, 0.0)
            items, found = iter(stream), []
            for step in range(10):  # the stream is told of every step when the one before has been taken from it
                begin(stream, 8 * step, step / 10)
                found += [next(items) for _ in range(4 // ranks)]
            items.close()
            assert {len(batch["input_ids"]) for batch, _, _ in found[:12]} == {8}
            for (batch, number, tokens), (expected, same, total) in zip(found, alone[rank::ranks], strict=True):
                assert batch.keys() == expected.keys() and number == same and tokens == total
                assert all(torch.equal(batch[name], expected[name]) for name in batch)
    later = begin(staged(rank=0, shorter=[(0.6, short)], consumed_rows=24), 24, 0.3)
    again = take(later, 4)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for (a, *_), (b, *_) in zip(again, alone[12::2], strict=False)
    )


def command(corpus, cache, out, *flags, steps=STEPS):
    return small_run(corpus, cache, out, *RECIPE, *(flags or STAGES), steps=steps)


@pytest.fixture(scope="module")
def whole(harness, tiny_corpus, cache, tmp_path_factory):
    """A run of two stages on one process."""
    out = tmp_path_factory.mktemp("stages") / "run"
    ran = harness.run(*command(tiny_corpus, cache, out)).check()
    assert f"after step {SWITCH}: rows of 64 tokens" in ran.stdout
    return out


def test_it_is_a_short_run_and_a_long_one_that_goes_on_from_it(harness, whole, tiny_corpus, cache, tmp_path):
    """Bit for bit: the second run continues the first one's checkpoint, in which its own settings are put."""
    schedule = ["--lr_scheduler_type", "constant", "--warmup_proportion", 0]
    first, second, staged = tmp_path / "first", tmp_path / "second", tmp_path / "staged"
    harness.run(*command(tiny_corpus, cache, staged, *STAGES, *schedule)).check()
    shape = ["--max_seq_length", 16, "--train_batch_size", 32, "--per_device_train_batch_size", 8]
    harness.run(*command(tiny_corpus, cache, first, *schedule, *shape, steps=SWITCH)).check()
    shape = ["--per_device_train_batch_size", 2, *schedule]
    harness.run(*command(tiny_corpus, cache, second, *shape, steps=1)).check()
    settings = json.loads((second / "step_1" / "state.json").read_text())["settings"]
    shutil.rmtree(second / "step_1")
    checkpoint = shutil.copytree(first / f"step_{SWITCH}", second / f"step_{SWITCH}")

    def make_it_long(state):
        state["settings"] = settings
        assert state["train"]["consumed_rows"] == 32 * SWITCH
        state["train"]["consumed_rows"] = 8 * SWITCH  # rows of 64 tokens

    change_state(checkpoint, make_it_long)
    words = command(tiny_corpus, cache, second, *shape, "--resume_from_checkpoint", checkpoint)
    assert "continuing from" in harness.run(*words).check().stdout
    same = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    mine = [[row[name] for name in same] for row in training_rows(staged)]
    theirs = [[row[name] for name in same] for row in training_rows(first)[:SWITCH] + training_rows(second)[-6:]]
    assert len(mine) == STEPS and mine == theirs
    assert all(weights(staged)[name].equal(other) for name, other in weights(second).items())
    assert results(staged)["eval_loss"] == results(second)["eval_loss"]
    assert sum(losses(staged)[step] for step in range(1, 6)) > sum(losses(staged)[step] for step in range(11, 16))


def test_steps_have_the_same_tokens_and_counts_are_of_full_rows(whole):
    rows = training_rows(whole)
    per_step = np.diff([row["tokens"] for row in rows], prepend=0)
    assert all(0.9 * 8 * 64 < tokens <= 8 * 64 for tokens in per_step)
    epochs = np.array([row["epoch"] for row in rows])
    assert np.diff(epochs, prepend=0) == pytest.approx(np.full(STEPS, epochs[0]))
    assert results(whole)["train_tokens"] == rows[-1]["tokens"] == per_step.sum()


@pytest.mark.parametrize("step", [SWITCH - 3, SWITCH - 1, SWITCH, SWITCH + 1])
def test_a_run_continues_bit_for_bit_before_at_and_behind_the_switch(
    harness, whole, tiny_corpus, cache, tmp_path, step
):
    assert_continues(harness, partial(command, tiny_corpus, cache), whole, tmp_path / "continued", step)


def test_a_row_of_the_log_is_of_one_stage(harness, whole, tiny_corpus, cache, tmp_path):
    """Whatever --logging_steps, one is written where a stage ends; so a logged speed is of one length."""
    words = command(tiny_corpus, cache, tmp_path / "seldom", *STAGES, "--logging_steps", 4)
    harness.run(*words).check()
    rows, every = training_rows(tmp_path / "seldom"), losses(whole)
    assert [row["step"] for row in rows] == [4, 8, SWITCH, 12, STEPS]
    means = [np.mean([every[step] for step in span]) for span in (range(5, 9), [9], range(10, 13))]
    assert [row["loss"] for row in rows[1:4]] == pytest.approx(means)


def readings(folder, switch, steps):
    """A clock file of a run of 0.01 hours: 0.6 of them have passed after `switch` steps, all after `steps`."""
    slow, fast = np.linspace(0, 21.6, switch + 1)[1:], np.linspace(21.6, 36, steps - switch + 1)[1:]
    path = folder / "clock.f64"
    np.concatenate([slow, fast]).astype("<f8").tofile(path)
    return path


def test_a_time_budget_switches_when_its_share_is_over(harness, tiny_corpus, cache, tmp_path):
    """By the agreed clock, so on two processes at the same step as on one, and in a continued run."""
    clock = ["--total_training_time", 0.01, "--replay_clock", readings(tmp_path, 5, 12)]
    words_for = lambda out: command(tiny_corpus, cache, out, *STAGES, *clock, steps=None)  # noqa: E731
    ran = harness.run(*words_for(tmp_path / "one")).check()
    assert "after step 5: rows of 64 tokens" in ran.stdout and results(tmp_path / "one")["train_steps"] == 12
    ddp = fp32_copy("accelerate_configs/ddp.yaml", tmp_path)
    for rank in harness.launch(*words_for(tmp_path / "two"), config=ddp):
        rank.check()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert results(tmp_path / "two")["train_tokens"] == results(tmp_path / "one")["train_tokens"]
    for step in (4, 5, 6):
        assert_continues(harness, words_for, tmp_path / "one", tmp_path / f"continued-{step}", step)


@pytest.fixture(scope="module")
def without_dropout(harness, tiny_corpus, cache, tmp_path_factory):
    """The same on one process, where every cut must compute the same."""
    out = tmp_path_factory.mktemp("stages") / "run"
    harness.run(*command(tiny_corpus, cache, out, *STAGES, "--hidden_dropout_prob", 0)).check()
    return out


@pytest.mark.parametrize(
    "config",
    ["ddp", "zero2", *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("fsdp", "tensor_parallel"))],
)
def test_two_processes_equal_one(harness, without_dropout, tiny_corpus, cache, out, tmp_path, config):
    yaml = fp32_copy(f"accelerate_configs/{config}.yaml", tmp_path)
    for rank in harness.launch(*command(tiny_corpus, cache, out, *STAGES, "--hidden_dropout_prob", 0), config=yaml):
        rank.check()
    assert losses(out) == pytest.approx(losses(without_dropout), abs=1e-5)
    assert results(out)["eval_loss"] == pytest.approx(results(without_dropout)["eval_loss"], abs=1e-5)


def test_with_a_growing_batch_and_a_falling_rate(harness, tiny_corpus, cache, tmp_path):
    """The three things that change in a run change together, and continue."""
    flags = ["--rampup_batch_size", 2, 2, 36, "--mlm_probability", 0.3, "--final_mlm_probability", 0.15]
    words_for = lambda out: command(tiny_corpus, cache, out, *STAGES, *flags)  # noqa: E731
    harness.run(*words_for(tmp_path / "whole")).check()
    per_step = np.diff([row["tokens"] for row in training_rows(tmp_path / "whole")], prepend=0)
    assert all(0.9 * 64 * size < tokens <= 64 * size for tokens, size in zip(per_step[:6], [2] * 6, strict=True))
    assert per_step[-1] > 0.9 * 64 * 8
    assert_continues(harness, words_for, tmp_path / "whole", tmp_path / "continued", SWITCH - 1)


def test_validation_is_of_the_last_length_all_along(harness, tiny_corpus, cache, out):
    """A rate of next to nothing: the model stays as it was, and so does what is judged."""
    flags = [*STAGES, "--eval_steps", 5, "--learning_rate", 1e-12]
    harness.run(*command(tiny_corpus, cache, out, *flags)).check()
    judged = [row["eval_loss"] for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row]
    assert len(judged) >= 3 and judged == pytest.approx([judged[0]] * len(judged), abs=1e-6)


def test_the_largest_batch_is_found_for_the_longest_rows(harness, tiny_corpus, cache, out):
    ran = harness.run(*command(tiny_corpus, cache, out, *STAGES, "--auto_find_batch_size", steps=5)).check()
    assert "global batch 8 rows = 2 per device x 4 accumulation" in ran.stdout
    assert "up to 60.0% of the run: " in ran.stdout and " rows of 16 tokens, 4 for one" in ran.stdout


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_of_equal_tokens_long_rows_need_the_most_memory(name, attention):
    """So what fits there, which is what --auto_find_batch_size tries, fits in every stage."""
    common = {"head": "masked", "packed": True, "attention": attention}
    short = estimate(Workload(MASKED[name], 16, 16, targets=6, **common))
    long = estimate(Workload(MASKED[name], 4, 64, targets=26, **common))
    assert short.total <= long.total


def test_other_stages_are_another_run(harness, whole, tiny_corpus, cache, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    other = ["--max_seq_length_stages", "32:0.6,64:0.4", "--per_device_train_batch_size", 2]
    words = command(tiny_corpus, cache, tmp_path / "run", *other, "--resume_from_checkpoint", tmp_path / "run/step_3")
    said = harness.run(*words).check(2).stderr
    assert "max_seq_length_stages 16:0.6,64:0.4 (now 32:0.6,64:0.4)" in said and said.count("\n") == 1
