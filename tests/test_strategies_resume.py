"""Under every YAML a killed run goes on bit for bit, and under another YAML with the same losses."""

import signal

import pytest

from common.checkpoint import latest_checkpoint
from pretraining import assert_same_run, fp32_copy, losses, wait_for_step
from strategies import CASES, FIRST, SCRIPTS, command, launch


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FIRST else pytest.mark.exhaustive) for n in CASES if n != "ddp"],
)
def test_a_killed_run_continues_bit_for_bit(harness, tiny_corpus, cache, tmp_path, shows, name):
    shows(name, SCRIPTS["bert"], CASES[name].ranks)
    whole, killed, case = tmp_path / "whole", tmp_path / "killed", CASES[name]
    flags = ["--checkpointing_steps", 3]
    words = [command("bert", tiny_corpus, cache, out, case.readers, *flags, dropout=0.1) for out in (whole, killed)]
    launch(harness, name, tmp_path, words[0])
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    processes = harness.start_ranks(*words[1], config=config, num_processes=None, pause_at=7)
    wait_for_step(processes[0], killed, 7)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, none of them sees another die and ends by itself
        for process in processes:
            process.signal(number)
    assert [process.wait().returncode for process in processes] == [-9] * case.ranks
    assert latest_checkpoint(killed).name in ("step_6", "step_9", "step_12", "step_15", "step_18")
    launch(harness, name, tmp_path, [*words[1], "--resume_from_checkpoint", "latest"])
    assert_same_run(whole, killed)


@pytest.fixture(scope="module")
def uninterrupted(harness, tiny_corpus, cache, tmp_path_factory):
    """The losses of one process that is left alone, by step."""
    out = tmp_path_factory.mktemp("single") / "run"
    harness.run(*command("bert", tiny_corpus, cache, out, 1)).check()
    return losses(out)


CHANGES = [("zero2", "fsdp"), ("fsdp", "zero3"), ("zero3", "hsdp"), ("hsdp", "ddp"), ("zero1", "zero2_offload")]
CHANGES += [("tensor_parallel", "zero2"), ("zero2", "tensor_parallel")]
CHANGES += [("fsdp", "tensor_parallel_fsdp"), ("tensor_parallel_fsdp", "tensor_parallel")]
CHANGES_FIRST = [("zero2", "fsdp"), ("tensor_parallel", "zero2")]


@pytest.mark.parametrize(
    "first, second",
    [pytest.param(*pair, marks=() if pair in CHANGES_FIRST else pytest.mark.exhaustive) for pair in CHANGES],
)
def test_a_run_continues_under_another_yaml(
    harness, uninterrupted, tiny_corpus, cache, tmp_path, shows, first, second
):
    shows(second, SCRIPTS["bert"], CASES[second].ranks)
    out = tmp_path / "run"
    config = fp32_copy(f"accelerate_configs/{first}.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, out, CASES[first].readers)
    processes = harness.start_ranks(*words, config=config, num_processes=None, pause_at=5)
    wait_for_step(processes[0], out, 5)
    processes[0].signal(signal.SIGTERM)
    assert {process.wait().returncode for process in processes} == {143}
    words = command("bert", tiny_corpus, cache, out, CASES[second].readers, "--resume_from_checkpoint", "latest")
    launch(harness, second, tmp_path, words)
    assert losses(out) == pytest.approx(uninterrupted, abs=1e-5)
