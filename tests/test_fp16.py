"""The loss scale of fp16: an overflow is no step, the scale is remembered, and it is not halved for ever."""

import signal

import pytest
import torch

from common.checkpoint import latest_checkpoint, read_state
from harness import REPOSITORY
from pretraining import assert_same_run, losses, results, small_run, training_rows, wait_for_step

SCALER = REPOSITORY / "tests" / "fp16_scaler.py"
FIRST, FITS = 2.0**16, 2.0**13  # three overflows


def command(corpus, cache, out, *flags, steps=6, scales=(FIRST, FITS)):
    _, *words = small_run(corpus, cache, out, *flags, steps=steps)
    return [SCALER, *scales, *words, "--checkpointing_steps", 2, "--save_total_limit", 9]


def scale_of(checkpoint):
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["scaler"]["scale"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_overflow_is_no_step(harness, tiny_corpus, cache, out, optimizer):
    harness.run(*command(tiny_corpus, cache, out, "--optimizer_type", optimizer)).check()
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6] and results(out)["train_steps"] == 6
    state = read_state(latest_checkpoint(out))["train"]
    assert state["consumed_rows"] == 8 * (6 + 3) and scale_of(latest_checkpoint(out)) == FITS
    rates = [row["learning_rate"] for row in training_rows(out)]
    assert len(set(rates)) == 6  # the schedule follows steps, not attempts


def test_a_fitting_scale_changes_nothing(harness, tiny_corpus, cache, tmp_path):
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    harness.run(*small_run(tiny_corpus, cache, plain, steps=6)).check()
    harness.run(*command(tiny_corpus, cache, scaled, scales=(2.0**10, FITS))).check()
    assert_same_run(plain, scaled)  # a power of two rounds nothing


def test_the_scale_goes_on_where_it_was(harness, tiny_corpus, cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--hidden_dropout_prob", 0.1]
    harness.run(*command(tiny_corpus, cache, whole, *flags, steps=8)).check()
    process = harness.start(*command(tiny_corpus, cache, killed, *flags, steps=8))
    wait_for_step(process, killed, 3)
    process.signal(signal.SIGKILL)
    assert process.wait().returncode == -9
    words = command(tiny_corpus, cache, killed, *flags, "--resume_from_checkpoint", "latest", steps=8)
    harness.run(*words).check()
    assert_same_run(whole, killed)


def test_overflows_without_end_are_a_clear_end(harness, tiny_corpus, cache, out):
    result = harness.run(*command(tiny_corpus, cache, out, scales=(FIRST, 0.0))).check(3)
    assert "40 updates in a row overflowed in fp16 at step 0" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("flag", ["--fp16"])
def test_fp16_needs_a_gpu(harness, tiny_corpus, cache, out, flag):
    words = [word for word in small_run(tiny_corpus, cache, out, steps=1) if word != "--fp32"]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "fp16 needs a GPU" in harness.run(*words, flag).check(2).stderr
