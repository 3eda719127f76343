"""Stopped, killed, resumed: the continued run equals the uninterrupted one bit for bit."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest

from common.checkpoint import _seal, complete_checkpoints, latest_checkpoint
from common.report import read_metrics
from harness import REPOSITORY
from pretraining import SCRIPT, assert_same_run, losses, results, small_run, training_rows, wait_for_step

DROPOUT = ["--hidden_dropout_prob", 0.1, "--attention_probs_dropout_prob", 0.1]


@pytest.fixture(scope="module")
def whole(harness, tiny_corpus, cache, tmp_path_factory):
    """An uninterrupted run: dropout, accumulation, more than one epoch, checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "run"
    harness.run(*command(tiny_corpus, cache, out)).check()
    assert results(out)["epoch"] > 1
    return out


def command(corpus, cache, out, *flags, steps=120):
    flags = [*DROPOUT, "--per_device_train_batch_size", 4, "--checkpointing_steps", 7, *flags]
    return small_run(corpus, cache, out, *flags, steps=steps)


def kill_at_random(harness, words, seconds):
    """Start a run and kill -9 it this long into its training; returns whether it was still running."""
    process = harness.start(*words)
    process.wait_for_output("model:")
    wait_a_while(process, seconds)
    alive = process.poll() is None
    process.kill_group()
    process.wait()
    return alive


def wait_a_while(process, seconds):
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def test_killed_at_random_moments_and_continued(harness, whole, tiny_corpus, cache, out, kills=20):
    rng = random.Random()
    words = command(tiny_corpus, cache, out, "--resume_from_checkpoint", "latest")
    killed = 0
    for _ in range(4 * kills):
        killed += kill_at_random(harness, words, rng.uniform(0, 0.6))
        shown = [step for step in losses(out)] if (out / "metrics.jsonl").exists() else []
        assert all(losses(out)[step] == losses(whole)[step] for step in shown)
        if killed == kills or (out / "all_results.json").exists():
            break
    assert killed >= 3, "the run is too short for its test"
    harness.run(*words).check()
    assert_same_run(whole, out)


def test_killed_while_saving_and_continued(harness, whole, tiny_corpus, cache, out):
    """A checkpoint that was being written, or that was damaged afterwards, is passed over."""
    words = command(tiny_corpus, cache, out)
    process = harness.start(*words, pause_at=30)
    wait_for_step(process, out, 30)
    process.kill_group()
    process.wait()
    newest, older = complete_checkpoints(out)[:2]
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-7])
    shutil.copytree(older, out / "step_9999.writing")
    assert latest_checkpoint(out) == older
    result = harness.run(*words, "--resume_from_checkpoint", "latest").check()
    assert f"continuing from {older}" in result.stdout
    assert_same_run(whole, out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits(harness, whole, tiny_corpus, cache, out, number, code):
    process = harness.start(*command(tiny_corpus, cache, out), pause_at=20)
    wait_for_step(process, out, 20)
    process.signal(number)
    result = process.wait()
    assert result.returncode == code and "Traceback" not in result.stderr
    assert not (out / "all_results.json").exists()
    stopped = latest_checkpoint(out)
    assert int(stopped.name.split("_")[1]) == max(losses(out)) >= 20
    harness.run(*command(tiny_corpus, cache, out), "--resume_from_checkpoint", stopped).check()
    assert_same_run(whole, out)


def test_a_second_signal_exits_at_once(harness, tiny_corpus, cache, out):
    """The first is being obeyed, slowly; the second does not wait for it."""
    slow = ["--train_batch_size", 65536, "--per_device_train_batch_size", 256]  # a step of a minute or more
    process = harness.start(*small_run(tiny_corpus, cache, out, steps=100), *slow)
    process.wait_for_output("model:")
    wait_a_while(process, 1)
    process.signal(signal.SIGTERM)
    wait_a_while(process, 0.2)
    assert process.poll() is None, "the step was meant to be slow"
    process.signal(signal.SIGTERM)
    assert process.wait(timeout=60).returncode == 143
    assert latest_checkpoint(out) is None


def test_muon_continues_bit_for_bit(harness, tiny_corpus, cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    muon = ["--optimizer_type", "muon"]
    harness.run(*command(tiny_corpus, cache, whole, *muon, steps=60)).check()
    process = harness.start(*command(tiny_corpus, cache, killed, *muon, steps=60), pause_at=20)
    wait_for_step(process, killed, 20)
    process.kill_group()
    process.wait()
    words = command(tiny_corpus, cache, killed, *muon, "--resume_from_checkpoint", "latest", steps=60)
    assert "continuing from" in harness.run(*words).check().stdout
    assert_same_run(whole, killed)


def test_latest_without_a_checkpoint_starts_from_the_beginning(harness, tiny_corpus, cache, out):
    words = small_run(tiny_corpus, cache, out, "--resume_from_checkpoint", "latest", steps=3)
    assert "starting from the beginning" in harness.run(*words).check().stdout
    assert results(out)["train_steps"] == 3


def test_a_timed_run_continues_bit_for_bit_with_the_clock_replayed(harness, tiny_corpus, cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*DROPOUT, "--total_training_time", 2.5 / 3600, "--checkpointing_steps", 5]
    harness.run(*small_run(tiny_corpus, cache, whole, *flags)).check()
    readings = np.fromfile(whole / "clock.f64")
    words = small_run(tiny_corpus, cache, killed, *flags, "--replay_clock", whole / "clock.f64")
    process = harness.start(*words, pause_at=12)
    wait_for_step(process, killed, 12)
    process.kill_group()
    process.wait()
    harness.run(*words, "--resume_from_checkpoint", "latest").check()
    assert_same_run(whole, killed)
    assert (np.fromfile(killed / "clock.f64") == readings).all()


def test_a_longer_budget_continues_a_finished_run(harness, tiny_corpus, cache, out):
    constant = ["--curve", "constant", "--warmup_proportion", 0]
    harness.run(*small_run(tiny_corpus, cache, out, *constant, steps=4)).check()
    first = training_rows(out)
    harness.run(*small_run(tiny_corpus, cache, out, *constant, "--resume_from_checkpoint", "latest", steps=7)).check()
    assert training_rows(out)[:4] == first and max(losses(out)) == 7


def test_other_settings_are_refused_by_name(harness, tiny_corpus, cache, out):
    harness.run(*small_run(tiny_corpus, cache, out, "--checkpointing_steps", 2, steps=3)).check()
    kept = (out / "metrics.jsonl").read_text()
    for flags, named in (
        (["--adam_beta2", 0.9], "adam_beta2 0.98 (now 0.9)"),
        (["--seed", 3], "seed 42 (now 3)"),
        (["--hidden_size", 64], "hidden_size 32 (now 64)"),
        (["--tokenizer_train_vocab_size", 500], "corpus"),
    ):
        words = small_run(tiny_corpus, cache, out, "--resume_from_checkpoint", "latest", *flags, steps=9)
        result = harness.run(*words).check(2)
        assert named in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert (out / "metrics.jsonl").read_text() == kept


def test_a_checkpoint_from_before_a_flag_counts_as_its_default(harness, tiny_corpus, cache, tmp_path):
    """Of a run that began when today's newest flags did not exist."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    flags = ["--checkpointing_steps", 2, "--save_total_limit", 9]
    harness.run(*small_run(tiny_corpus, cache, whole, *flags, steps=4)).check()
    shutil.copytree(whole, old)
    absent = ("rampup_batch_size", "ema_decay", "masking", "random_replace_prob", "decay_rate")
    change_state(old / "step_2", lambda state: [state["settings"].pop(name) for name in absent])
    words = small_run(tiny_corpus, cache, old, *flags, "--resume_from_checkpoint", old / "step_2", steps=4)
    for flags, named in (
        (["--masking", "ngram"], "masking token (now ngram)"),
        (
            ["--rampup_batch_size", 4, 4, 40, "--per_device_train_batch_size", 4],
            "rampup_batch_size [] (now [4, 4, 40])",
        ),
    ):
        assert named in harness.run(*words, *flags).check(2).stderr
    result = harness.run(*words).check()
    assert "continuing from" in result.stdout and "note:" not in result.stdout
    assert_same_run(whole, old)
    change_state(whole / "step_2", lambda state: state["settings"].pop("corpus"))
    words[words.index("--output_dir") + 1] = whole
    words[words.index("--resume_from_checkpoint") + 1] = whole / "step_2"
    assert "corpus None (now " in harness.run(*words).check(2).stderr


def change_state(checkpoint, change):
    """Change what a checkpoint remembers, as if it had been written so."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state, indent=1))
    (checkpoint / "manifest.json").unlink()
    _seal(checkpoint)


def test_a_stop_between_two_logs_and_validations_changes_no_row(harness, tiny_corpus, cache, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--logging_steps", 7, "--eval_steps", 1]
    harness.run(*small_run(tiny_corpus, cache, whole, *flags, steps=60)).check()
    words = small_run(tiny_corpus, cache, stopped, *flags, steps=60)
    process = harness.start(*words, pause_at=14)
    wait_for_step(process, stopped, 14)
    process.signal(signal.SIGTERM)
    assert process.wait().returncode == 143
    harness.run(*words, "--resume_from_checkpoint", "latest").check()
    assert_same_run(whole, stopped)
    evaluations = [
        [(row["step"], row["eval_loss"]) for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row]
        for out in (whole, stopped)
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 60


def test_going_back_to_an_older_checkpoint(harness, tiny_corpus, cache, out):
    """Later checkpoints are put aside, so that `latest` finds the new continuation."""
    flags = ["--checkpointing_steps", 4, "--save_total_limit", 5]
    harness.run(*small_run(tiny_corpus, cache, out, *flags, steps=12)).check()
    (out / "step_99.writing").mkdir()
    back = small_run(tiny_corpus, cache, out, *flags, "--resume_from_checkpoint", out / "step_4", steps=7)
    harness.run(*back).check()
    assert max(losses(out)) == 7 and latest_checkpoint(out).name == "step_7"
    assert sorted(path.name for path in out.glob("step_*")) == [
        "step_12.superseded",
        "step_4",
        "step_7",
        "step_8.superseded",
    ]


def test_after_a_loss_that_is_no_number_a_lower_rate_continues(harness, tiny_corpus, cache, out):
    flags = ["--max_grad_norm", 0, "--checkpointing_steps", 1, "--save_total_limit", 9, "--curve", "constant"]
    words = small_run(tiny_corpus, cache, out, *flags, steps=10)
    harness.run(*words, "--learning_rate", 1e20, "--warmup_proportion", 0.5).check(3)
    good = out / "step_1"  # the first step of a warm-up has a rate of 0
    result = harness.run(*words, "--learning_rate", 1e-3, "--resume_from_checkpoint", good).check()
    assert "note: learning_rate is now 0.001; it was 1e+20" in result.stdout
    assert "note: warmup_proportion is now 0.06" in result.stdout
    assert results(out)["train_steps"] == 10


def test_a_finished_run_and_shorter_limits(harness, tiny_corpus, cache, out):
    harness.run(*small_run(tiny_corpus, cache, out, steps=4)).check()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    words = small_run(tiny_corpus, cache, out, "--resume_from_checkpoint", "latest", steps=3)
    assert "finished" in harness.run(*words).check().stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    wrong = small_run(tiny_corpus, cache, out, "--resume_from_checkpoint", out / "step_3", steps=4)
    assert "does not exist" in harness.run(*wrong).check(2).stderr
    for path in out.glob("step_*"):
        shutil.rmtree(path)
    longer = small_run(tiny_corpus, cache, out, "--resume_from_checkpoint", "latest", steps=9)
    assert "finished run without a checkpoint" in harness.run(*longer).check(2).stderr
    assert results(out)["train_steps"] == 4


def test_runs_that_start_in_the_same_second_have_their_own_folders(harness, tiny_corpus, cache, tmp_path):
    words = [str(REPOSITORY / SCRIPT), *small_run(tiny_corpus, cache, "unused", steps=2)[1:]]
    at = words.index("--output_dir")
    del words[at : at + 2]
    runs = [harness.start(*words, cwd=tmp_path) for _ in range(2)]
    for run in runs:
        run.wait().check()
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(results(folder)["train_steps"] == 2 for folder in folders)


def test_the_attention_path_is_measured_once(harness, tiny_corpus, cache, tmp_path):
    whole, continued = tmp_path / "whole", tmp_path / "continued"
    flags = ["--attn_implementation", "auto", "--checkpointing_steps", 4]
    first = harness.run(*small_run(tiny_corpus, cache, whole, *flags, steps=8)).check()
    assert "attention: " in first.stdout
    shutil.copytree(whole, continued)
    resume = ["--resume_from_checkpoint", continued / "step_4"]
    second = harness.run(*small_run(tiny_corpus, cache, continued, *flags, *resume, steps=8)).check()
    assert "continuing from" in second.stdout and "attention: " not in second.stdout
    assert_same_run(whole, continued)
