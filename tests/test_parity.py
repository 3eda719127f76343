"""Two processes equal one: same losses, same weights, the strategy really in force, whatever is killed."""

import signal
from pathlib import Path

import pytest

from common.checkpoint import latest_checkpoint
from pretraining import (
    SCRIPT,
    assert_same_run,
    fp32_copy,
    losses,
    results,
    small_run,
    training_rows,
    wait_for_step,
    weights,
)

CONFIGS = ["accelerate_configs/cpu.yaml", "accelerate_configs/ddp.yaml"]


@pytest.fixture(scope="module")
def single(harness, tiny_corpus, cache, tmp_path_factory):
    """20 steps on one process: accumulation 4, clipping active."""
    out = tmp_path_factory.mktemp("single") / "run"
    harness.run(*command(tiny_corpus, cache, out)).check()
    assert min(row["grad_norm"] for row in training_rows(out)) > 0.2, "clipping was meant to be active"
    return out


def command(corpus, cache, out, *flags):
    flags = ["--per_device_train_batch_size", 4, "--max_grad_norm", 0.2, "--learning_rate", 3e-3, *flags]
    return small_run(corpus, cache, out, *flags, steps=20, batch=16)


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_equal_one(harness, single, tiny_corpus, cache, tmp_path, shows, config):
    shows(Path(config).stem, SCRIPT, 2)
    out = tmp_path / "two"
    ranks = harness.launch(*command(tiny_corpus, cache, out), config=fp32_copy(config, tmp_path))
    for rank in ranks:
        rank.check()
    assert ranks[1].stdout == "" and "data parallel (DDP), 2 process(es), fp32" in ranks[0].stdout
    assert results(out)["world_size"] == 2 and results(out)["strategy"] == "data parallel (DDP)"
    assert losses(out) == pytest.approx(losses(single), abs=1e-5)
    assert results(out)["eval_loss"] == pytest.approx(results(single)["eval_loss"], abs=1e-5)
    assert results(out)["train_tokens"] == results(single)["train_tokens"]
    mine, yours = weights(out), weights(single)
    assert mine.keys() == yours.keys()
    apart = max(float((mine[name] - yours[name]).abs().max()) for name in mine)
    most = max(abs(losses(out)[step] - losses(single)[step]) for step in losses(out))
    print(f"{config}: losses differ by at most {most:.1e}, weights by {apart:.1e}")
    assert apart < 1e-5
    assert results(out)["parameter_bytes_per_rank"] == results(single)["parameter_bytes_per_rank"]


@pytest.mark.parametrize("config", ["accelerate_configs/cpu.yaml", "accelerate_configs/single_gpu.yaml"])
def test_one_launched_process_equals_a_plain_one_bit_for_bit(
    harness, single, tiny_corpus, cache, tmp_path, shows, config
):
    shows(Path(config).stem, SCRIPT, 1)
    out = tmp_path / "one"
    words = command(tiny_corpus, cache, out)
    (rank,) = harness.launch(*words, config=fp32_copy(config, tmp_path), num_processes=None)
    assert "strategy: single process, 1 process(es), fp32" in rank.check().stdout
    assert_same_run(single, out)


def test_dropout_follows_the_micro_batch_not_the_process(harness, tiny_corpus, cache, tmp_path):
    flags = ["--hidden_dropout_prob", 0.1, "--attention_probs_dropout_prob", 0.1]
    one, two = tmp_path / "one", tmp_path / "two"
    harness.run(*command(tiny_corpus, cache, one, *flags)).check()
    for rank in harness.launch(*command(tiny_corpus, cache, two, *flags), config=fp32_copy(CONFIGS[1], tmp_path)):
        rank.check()
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_stops_all_and_the_run_continues_bit_for_bit(
    harness, tiny_corpus, cache, tmp_path, victim
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = fp32_copy(CONFIGS[0], tmp_path)
    flags = ["--hidden_dropout_prob", 0.1]
    for rank in harness.launch(*command(tiny_corpus, cache, whole, *flags), config=config):
        rank.check()
    ranks = harness.start_ranks(*command(tiny_corpus, cache, stopped, *flags), config=config, pause_at=1)
    wait_for_step(ranks[0], stopped, 1)
    ranks[victim].signal(signal.SIGTERM)
    ranks[0].signal(signal.SIGCONT)  # it is the one that paused
    assert [rank.wait().returncode for rank in ranks] == [143, 143]
    assert latest_checkpoint(stopped).name == f"step_{max(losses(stopped))}" and max(losses(stopped)) < 20
    resumed = command(tiny_corpus, cache, stopped, *flags, "--resume_from_checkpoint", "latest")
    for rank in harness.launch(*resumed, config=config):
        rank.check()
    assert_same_run(whole, stopped)


def test_a_run_continues_on_another_number_of_processes(harness, single, tiny_corpus, cache, tmp_path):
    out = tmp_path / "mixed"
    process = harness.start(*command(tiny_corpus, cache, out), pause_at=5)
    wait_for_step(process, out, 5)
    process.signal(signal.SIGTERM)
    assert process.wait().returncode == 143
    resumed = command(tiny_corpus, cache, out, "--resume_from_checkpoint", "latest")
    for rank in harness.launch(*resumed, config=fp32_copy(CONFIGS[0], tmp_path)):
        rank.check()
    assert losses(out) == pytest.approx(losses(single), abs=1e-5)


@pytest.mark.parametrize("fault", ["no checkpoint", "no text"])
def test_what_the_main_process_finds_ends_all_of_them(harness, tiny_corpus, cache, tmp_path, fault):
    words = command(tiny_corpus if fault == "no checkpoint" else tmp_path / "nothing.txt", cache, tmp_path / "run")
    words += ["--resume_from_checkpoint", tmp_path / "step_9"]
    ranks = harness.launch(*words, config=fp32_copy(CONFIGS[0], tmp_path))
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert ranks[0].stderr.count("error: ") == 1 and "Traceback" not in ranks[0].stderr + ranks[1].stderr


def test_half_a_launch_is_refused(harness, tiny_corpus, cache, out):
    result = harness.run(*command(tiny_corpus, cache, out), env={"WORLD_SIZE": "2", "RANK": "0"}).check(2)
    assert "accelerate cannot start 2 process(es)" in result.stderr and not out.exists()


def test_an_unknown_role_is_refused(harness, tiny_corpus, cache, out):
    result = harness.run(*command(tiny_corpus, cache, out), env={"ROLE_NAME": "pipline schedule=2bw"}).check(2)
    assert "pipline" in result.stderr and "cpu" in result.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [1, 2])
def test_a_compiled_model_trains_as_an_eager_one(harness, single, tiny_corpus, cache, tmp_path, processes):
    out = tmp_path / "compiled"
    words = command(tiny_corpus, cache, out, "--torch_compile", "true")
    ranks = harness.launch(*words, config=fp32_copy(CONFIGS[1], tmp_path), num_processes=processes)
    for rank in ranks:
        rank.check()
    assert "compiled; the first step took" in ranks[0].stdout + ranks[0].stderr
    assert losses(out) == pytest.approx(losses(single), abs=1e-5)
    assert results(out)["eval_loss"] == pytest.approx(results(single)["eval_loss"], abs=1e-5)


@pytest.mark.exhaustive
def test_a_compiled_model_in_bf16(harness, tiny_corpus, cache, tmp_path):
    """As far from the eager one as bf16 rounds: compiled kernels keep in fp32 what eager ones round in between."""
    outs = []
    for compiled in ("true", "false"):
        out = tmp_path / compiled
        words = command(tiny_corpus, cache, out, "--torch_compile", compiled, "--max_train_steps", 3)
        harness.run(*[word for word in words if word != "--fp32"], "--bf16").check()
        assert results(out)["precision"] == "bf16"
        outs.append(out)
    assert losses(outs[0]) == pytest.approx(losses(outs[1]), rel=2e-3)
