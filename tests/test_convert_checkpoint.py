"""A checkpoint in training becomes a folder that from_pretrained loads, whole or not at all."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from causal import causal_run
from common.checkpoint import latest_checkpoint
from common.convert_checkpoint import convert, find_checkpoint, main
from common.errors import UserError, run_main
from pretraining import fp32_copy, small_run, weights

ENVIRONMENT = {"FRUGAL_VENV": str(Path(sys.executable).parent.parent)}


@pytest.fixture(scope="module")
def runs(harness, tiny_corpus, cache, tmp_path_factory):
    """Finished runs, whose last checkpoints hold their final weights: of BERT with FSDP2, of OPT with ZeRO-3."""
    folder = tmp_path_factory.mktemp("runs")
    batch = ["--per_device_train_batch_size", 4, "--optimizer_type", "adamw"]
    commands = {
        "fsdp": small_run(tiny_corpus, cache, folder / "fsdp", *batch, steps=2),
        "zero3": causal_run(tiny_corpus, cache, folder / "zero3", *batch, steps=2, batch=8),
    }
    for name, words in commands.items():
        config = fp32_copy(f"accelerate_configs/{name}.yaml", folder)
        for rank in harness.launch(*words, config=config, num_processes=None):
            rank.check()
    return folder


def assert_same_model(auto, converted, run):
    """What from_pretrained makes of both folders is the same, and nothing of it is missing or left over."""
    models = []
    for folder in (converted, run):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        models.append(model.state_dict())
    mine, yours = models
    assert mine.keys() == yours.keys() and all(mine[name].equal(yours[name]) for name in mine)


def test_the_script_makes_a_folder_with_the_final_weights(harness, runs, tmp_path, monkeypatch, capsys):
    run, out = runs / "fsdp", tmp_path / "model"
    result = harness.command("bash", "scripts/convert_checkpoint.sh", run, out, env=ENVIRONMENT).check()
    assert str(latest_checkpoint(run)) in result.stdout and "note" not in result.stdout
    assert_same_model(AutoModelForMaskedLM, out, run)
    assert AutoTokenizer.from_pretrained(out)("a word") == AutoTokenizer.from_pretrained(run)("a word")
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint", str(run), str(out)])
    capsys.readouterr()  # what transformers has shown so far
    with pytest.raises(SystemExit) as again:
        run_main(main)
    assert again.value.code == 2
    assert capsys.readouterr().err == f"error: {out} is there already: name a new folder, or an empty one\n"


def test_large_weights_are_cut_into_shards(runs, tmp_path):
    run, out = runs / "zero3", tmp_path / "model"
    out.mkdir()
    names = convert(latest_checkpoint(run), out, "100KB")
    assert "model.safetensors.index.json" in names and sum(name.startswith("model-0") for name in names) > 1
    assert_same_model(AutoModelForCausalLM, out, run)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_precision_asked_for(runs, tmp_path, dtype):
    run, out = runs / "fsdp", tmp_path / "model"
    convert(latest_checkpoint(run), out, "5GB", dtype)
    rounded, whole = (AutoModelForMaskedLM.from_pretrained(folder, dtype="auto") for folder in (out, run))
    assert rounded.dtype == getattr(torch, dtype) and whole.dtype == torch.float32
    expected = whole.to(rounded.dtype).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in rounded.state_dict().items())


def test_a_damaged_checkpoint_is_refused(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "fsdp", run)
    step = latest_checkpoint(run)
    with open(step / "model.safetensors", "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x7f\x7f")
    with pytest.raises(UserError, match="model.safetensors differs from its checksum"):
        find_checkpoint(step)
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_checkpoint(run)


def test_nothing_is_left_where_it_fails(runs, tmp_path):
    with pytest.raises(UserError, match="max-shard-size 'large'"):
        convert(latest_checkpoint(runs / "fsdp"), tmp_path / "model", "large")
    with pytest.raises(UserError, match="dtype 'int8' is unknown: give one of float32, bfloat16, float16"):
        convert(latest_checkpoint(runs / "fsdp"), tmp_path / "model", "5GB", "int8")
    assert not list(tmp_path.iterdir()) and weights(runs / "fsdp")
    with pytest.raises(UserError, match="is not a folder"):
        find_checkpoint(tmp_path / "absent")
