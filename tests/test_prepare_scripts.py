"""The prepare_*.sh scripts on real text, and what is trained on it; engines that run shards elsewhere."""

import os
import sys

import pytest
from test_prepare_pile_data import content, texts, write_lines

from common.data.token_files import TokenFile

STEPS = ["--model_size", "tiny", "--max_train_steps", 3, "--per_device_train_batch_size", 4, "--train_batch_size", 4]


def number_of_documents(folder):
    names = [name for name in ("train", "validation", "test") if (folder / f"{name}.bin").exists()]
    return sum(TokenFile(folder / name).num_documents for name in names)


@pytest.mark.parametrize(
    ("script", "arguments", "least"),
    [
        ("prepare_pile.sh", ["all", "vocab/bert-base-uncased", "pile/sample.jsonl.zst"], 1000),
        # its documents are copies of three, which are too few to hold one out
        (
            "prepare_pile.sh",
            ["all", "vocab/bert-base-uncased", "pile/lm_dataformat_blns.jsonl.zst.tar", "--deduplicate", "false"],
            8,
        ),
        pytest.param(
            *("prepare_pile.sh", ["all", "vocab/bert-base-uncased", "pile/*.jsonl"], 20), marks=pytest.mark.exhaustive
        ),
        pytest.param(
            *("prepare_pile.sh", ["all", "vocab/bert-base-uncased", "wikitext-2/*.txt", "--workers", 2], 10_000),
            marks=pytest.mark.exhaustive,
        ),
        ("prepare_wikipedia.sh", ["wikipedia/enwiki*.bz2", "vocab/bert-base-uncased"], 50),
        ("prepare_wikipedia.sh", ["wikipedia/wikiextractor", "vocab/bert-base-uncased"], 1),
        ("prepare_bookcorpus.sh", ["books/*.txt", "train", "--document_separator", "blank_line"], 500),
    ],
)
def test_real_text_is_prepared_and_trained_on(harness, data_folder, tmp_path, script, arguments, least):
    words = [data_folder / word if "/" in str(word) else word for word in arguments]
    harness.command("bash", f"scripts/{script}", tmp_path / "out", *words).check()
    assert number_of_documents(tmp_path / "out") >= least
    flags = ["--dataset_path", tmp_path / "out", *STEPS, "--fp32", "--output_dir", tmp_path / "run"]
    harness.run("run_pretraining.py", *flags, "--cache_dir", tmp_path / "cache").check()


def test_what_the_scripts_refuse(harness, tmp_path):
    for script, most in (("prepare_pile.sh", 4), ("prepare_wikipedia.sh", 3), ("prepare_bookcorpus.sh", 3)):
        ended = harness.command("bash", f"scripts/{script}", *map(str, range(most + 1))).check(2)
        assert f"error: too many arguments: {most}" in ended.stderr and "Usage: bash scripts/prepare_" in ended.stderr
    ended = harness.command("bash", "scripts/prepare_pile.sh", tmp_path / "out", "0 30").check(2)
    assert "there are 30, from 0 to 29" in ended.stderr


def test_a_job_array(harness, tmp_path):
    for number in range(2):
        write_lines(tmp_path / f"{number}.txt", texts(200, number))
    flags = ["--input", f"{tmp_path}/*.txt", "--tokenizer_train_vocab_size", 300, "--workers", 1]
    harness.run("prepare_pile_data.py", *flags, "--output_dir", tmp_path / "one").check()
    env = {"SLURM_SUBMIT_DIR": os.getcwd()}
    words = ["bash", "scripts/prepare_slurm.sbatch", *flags, "--output_dir", tmp_path / "array"]
    for number in (1, 0):
        harness.command(*words, env=env | {"SLURM_ARRAY_TASK_ID": str(number)}).check()
    harness.command(*words, env=env).check()
    assert content(tmp_path / "one") == content(tmp_path / "array")
    assert "give the flags" in harness.command("bash", "scripts/prepare_slurm.sbatch").check(2).stderr


def test_datatroves_executor(harness, tmp_path):
    write_lines(tmp_path / "a.txt", texts(300))
    flags = ["--input", str(tmp_path / "a.txt"), "--tokenizer_train_vocab_size", "300", "--workers", "1"]
    harness.run("prepare_pile_data.py", *flags, "--num_shards", 3, "--output_dir", tmp_path / "one").check()
    program = f"""
from datatrove.executor import LocalPipelineExecutor
from common.prepare.datatrove import TokenizeShard
flags = {flags!r} + ["--output_dir", {str(tmp_path / "many")!r}]
LocalPipelineExecutor([TokenizeShard(flags)], tasks=3, workers=1, logging_dir={str(tmp_path / "logs")!r}).run()
"""
    harness.command(sys.executable, "-c", program).check()
    harness.run("prepare_pile_data.py", "merge", *flags, "--num_shards", 3, "--output_dir", tmp_path / "many").check()
    assert content(tmp_path / "one") == content(tmp_path / "many")
