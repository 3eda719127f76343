"""The loss scale of fp16: an overflow is no step, the scale is remembered, and it is not halved for ever."""

import signal
from types import SimpleNamespace

import pytest
import torch

from common.checkpoint import latest_checkpoint, read_state
from harness import REPOSITORY
from pretraining import assert_same_run, losses, results, small_run, training_rows, wait_for_step

SCALER = REPOSITORY / "tests" / "fp16_scaler.py"
FIRST, FITS = 2.0**16, 2.0**13  # three overflows


def command(corpus, cache, out, *flags, steps=6, scales=(FIRST, FITS)):
    return [
        SCALER,
        *scales,
        *small_run(corpus, cache, out, *flags, steps=steps),
        "--checkpointing_steps",
        2,
        "--save_total_limit",
        9,
    ]


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


def test_an_overflow_is_no_step_of_fine_tuning(harness, tiny_corpus, cache, tmp_path, out):
    pretrained, task = tmp_path / "pretrained", tmp_path / "task.csv"
    harness.run(*small_run(tiny_corpus, cache, pretrained, steps=1)).check()
    task.write_text(
        "sentence,label\n" + "".join(f"a {'good' if n % 2 else 'bad'} day {n},{n % 2}\n" for n in range(20))
    )
    flags = ["--train_file", task, "--validation_file", task, "--do_train", "--do_eval", "--fp32", "--output_dir", out]
    flags += ["--per_device_train_batch_size", 4, "--num_train_epochs", 2, "--logging_steps", 1]
    words = [SCALER, FIRST, FITS, "run_glue.py", "--model_name_or_path", pretrained, *flags]
    harness.run(*words, "--save_strategy", "epoch").check()
    assert list(losses(out)) == list(range(1, 11)) and results(out)["train_steps"] == 10
    first, last = (read_state(out / f"step_{step}")["train"]["consumed_rows"] for step in (5, 10))
    assert (first, last) == (4 * (5 + 3), 4 * (10 + 3)) and scale_of(out / "step_10") == FITS


def test_deepspeed_goes_on_with_its_own_loss_scale():
    """Of DeepSpeed's class, which runs in fp16 alone: halved once, and ten updates since then."""
    zero = pytest.importorskip("common.parallel.zero")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def scaled():
        return DynamicLossScaler(2.0**16, scale_window=20, min_scale=1, delayed_shift=2, consecutive_hysteresis=False)

    def optimizer(scaler):
        return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))

    def go_on(scaler, updates):
        for _ in range(updates):
            scaler.update_scale(False)
        return scaler

    verbs = zero.ZeroAccelerator
    whole, again = scaled(), scaled()
    whole.last_overflow_iter = whole.cur_iter
    whole.cur_scale, whole.cur_hysteresis = 2.0**15, 1
    go_on(whole, 10)
    saved = verbs.loss_scale_state(None, optimizer(whole))
    assert saved["scale"] == 2.0**15 and all(isinstance(value, int | float) for value in saved.values())
    verbs.set_loss_scale_state(None, optimizer(again), saved)
    for updates in range(1, 16):
        go_on(whole, 1), go_on(again, 1)
        assert vars(whole) == vars(again), updates
    assert whole.cur_scale == 2.0**16


def test_a_fitting_scale_changes_nothing(harness, tiny_corpus, cache, tmp_path):
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    harness.run(*small_run(tiny_corpus, cache, plain, steps=6)).check()
    harness.run(*command(tiny_corpus, cache, scaled, scales=(2.0**10, FITS))).check()
    assert_same_run(plain, scaled)  # a power of two rounds nothing


def test_the_scale_goes_on_where_it_was(harness, tiny_corpus, cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--hidden_dropout_prob", 0.1]
    harness.run(*command(tiny_corpus, cache, whole, *flags, steps=8)).check()
    process = harness.start(*command(tiny_corpus, cache, killed, *flags, steps=8), pause_at=3)
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
