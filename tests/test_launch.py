"""The commands that users type: the shell script and the real launcher, and what is left when they are killed."""

import os
import signal
import time

import pytest

from common.checkpoint import latest_checkpoint
from pretraining import SMALL, fp32_copy, losses, results, small_run, wait_for_step

pytestmark = pytest.mark.slow
SHELL = ["bash", "scripts/run_pretraining.sh"]


def python_processes(marker):
    """Process numbers whose command line mentions `marker`."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                if entry.isdigit() and str(marker).encode() in file.read():
                    found.append(int(entry))
        except (FileNotFoundError, ProcessLookupError, NotADirectoryError, PermissionError):
            continue
    return found


def wait_until_gone(marker, seconds=60):
    deadline = time.monotonic() + seconds
    while (left := python_processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"still running: {left}"


@pytest.fixture
def venv_of_tests():
    """The shell scripts use the environment that runs the tests."""
    import sys

    return {"FRUGAL_VENV": str(os.path.dirname(os.path.dirname(sys.executable)))}


def test_the_shell_script_trains_and_passes_flags_on(harness, tiny_corpus, cache, out, venv_of_tests):
    flags = [str(word) for word in SMALL if word != "--fp32"]
    words = ["cpu", "0.001", "tiny", tiny_corpus, "--output_dir", out, "--cache_dir", cache, *flags]
    words += ["--tokenizer_train_vocab_size", 600, "--train_batch_size", 8]
    result = harness.command(*SHELL, *words, env=venv_of_tests).check()
    assert "unigram baseline" in result.stdout and results(out)["train_runtime"] >= 3.6
    assert results(out)["stop_reason"] == "time budget spent"


def test_the_shell_script_ends_bad_input_with_2(harness, tiny_corpus, out, venv_of_tests):
    for words, named in (
        (["cpu", "0.1", "tiny", "no/such/file.txt", "--output_dir", out], "no/such/file.txt"),
        (["nowhere"], "nowhere"),
        (["cpu", "0", "tiny", tiny_corpus], "--total_training_time"),
        (["cpu", "1", "tiny", "embedded", "surplus"], "surplus"),
    ):
        result = harness.command(*SHELL, *words, env=venv_of_tests | {"HF_HUB_OFFLINE": "1"}).check(2)
        assert named in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_launcher_saves_and_leaves_no_process(harness, tiny_corpus, cache, out, number):
    words = [str(word) for word in small_run(tiny_corpus, cache, out, steps=100_000) if word != "--fp32"]
    launcher = harness.start_accelerate_launch(
        words[0], *words[1:], config=fp32_copy("accelerate_configs/cpu.yaml", out.parent), num_processes=2
    )
    wait_for_step(launcher, out, 3)
    launcher.signal(number)
    launcher.wait(timeout=90)
    wait_until_gone(out)
    assert latest_checkpoint(out).name == f"step_{max(losses(out))}"
