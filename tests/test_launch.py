"""The commands that users type: the shell script and the real launcher, and what is left when they are killed."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from common.checkpoint import latest_checkpoint
from harness import REPOSITORY
from pretraining import SMALL, fp32_copy, losses, results, small_run, wait_for_step

pytestmark = pytest.mark.slow


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


def test_the_shell_script_trains_from_another_folder(harness, tiny_corpus, tmp_path):
    shutil.copy(tiny_corpus, tmp_path / "my corpus.txt")
    shell = ["bash", REPOSITORY / "scripts" / "run_pretraining.sh", "cpu", "0.001", "tiny"]
    environment = {"FRUGAL_VENV": str(Path(sys.executable).parent.parent)}
    flags = [str(word) for word in SMALL if word != "--fp32"]
    words = ["my corpus.txt", "--output_dir", "out", "--cache_dir", "cache", *flags]
    words += ["--tokenizer_train_vocab_size", 600, "--train_batch_size", 8]
    result = harness.command(*shell, *words, cwd=tmp_path, env=environment).check()
    assert "unigram baseline" in result.stdout
    assert results(tmp_path / "out")["train_runtime"] >= 3.6
    assert results(tmp_path / "out")["stop_reason"] == "time budget spent"
    assert "scripts/run_pretraining.sh cpu 0.001 tiny " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_a_signal_to_the_launcher_saves_and_leaves_no_process(harness, tiny_corpus, cache, out, number, processes):
    words = [str(word) for word in small_run(tiny_corpus, cache, out, steps=100_000) if word != "--fp32"]
    config = fp32_copy("accelerate_configs/cpu.yaml", out.parent)
    launcher = harness.start_accelerate_launch(*words, config=config, num_processes=processes)
    wait_for_step(launcher, out, 3)
    launcher.signal(number)
    launcher.wait(timeout=90)
    wait_until_gone(out)
    assert latest_checkpoint(out).name == f"step_{max(losses(out))}"
