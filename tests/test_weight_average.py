"""The average of the weights: what a plain loop computes from every step's weights, under every cut, continued."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_objectives import assert_continues
from transformers import AutoModelForMaskedLM

from pretraining import fp32_copy, results, small_run

DECAY, STEPS = 0.7, 10


def command(corpus, cache, out, *flags):
    flags = ["--ema_decay", DECAY, "--optimizer_type", "adamw", "--learning_rate", 3e-3, *flags]
    flags += ["--checkpointing_steps", 1, "--save_total_limit", 99, "--per_device_train_batch_size", 4]
    return small_run(corpus, cache, out, *flags, steps=STEPS, batch=8)


@pytest.fixture(scope="module")
def single(harness, tiny_corpus, cache, tmp_path_factory):
    """A run on one process that keeps the weights of every step."""
    out = tmp_path_factory.mktemp("average") / "run"
    harness.run(*command(tiny_corpus, cache, out)).check()
    return out


def average(out):
    return load_file(out / "ema" / "model.safetensors")


def test_equal_to_a_plain_loop_over_the_checkpoints(single):
    expected = {name: tensor.double() for name, tensor in load_file(single / "step_1" / "model.safetensors").items()}
    for step in range(2, STEPS + 1):
        weights = load_file(single / f"step_{step}" / "model.safetensors")
        expected = {name: DECAY * expected[name] + (1 - DECAY) * weights[name] for name in expected}
    found = average(single)
    apart = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    assert max(apart.values()) < 1e-6 * max(float(tensor.abs().max()) for tensor in expected.values()), apart
    assert not torch.equal(
        found["cls.predictions.bias"], load_file(single / "model.safetensors")["cls.predictions.bias"]
    )
    model, info = AutoModelForMaskedLM.from_pretrained(single / "ema", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert results(single)["ema_eval_loss"] > 0 and results(single)["ema_eval_loss"] != results(single)["eval_loss"]


def test_training_knows_nothing_of_it(harness, single, tiny_corpus, cache, tmp_path):
    words = command(tiny_corpus, cache, tmp_path / "without")
    at = words.index("--ema_decay")
    harness.run(*words[:at], *words[at + 2 :]).check()
    mine, yours = (load_file(out / "model.safetensors") for out in (single, tmp_path / "without"))
    assert all(mine[name].equal(yours[name]) for name in mine)


def test_it_continues_bit_for_bit(harness, single, tiny_corpus, cache, tmp_path):
    assert_continues(harness, partial(command, tiny_corpus, cache), single, tmp_path / "continued", 4)
    mine, yours = average(tmp_path / "continued"), average(single)
    assert all(mine[name].equal(yours[name]) for name in mine)
    assert results(tmp_path / "continued")["ema_eval_loss"] == results(single)["ema_eval_loss"]


@pytest.mark.parametrize(
    "config",
    [
        "ddp",
        "fsdp",
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("zero2", "fsdp_offload", "tensor_parallel")),
    ],
)
def test_two_processes_equal_one(harness, single, tiny_corpus, cache, tmp_path, config):
    out, yaml = tmp_path / "two", fp32_copy(f"accelerate_configs/{config}.yaml", tmp_path)
    for rank in harness.launch(*command(tiny_corpus, cache, out), config=yaml):
        rank.check()
    mine, yours = average(out), average(single)
    assert mine.keys() == yours.keys()
    assert all(torch.allclose(mine[name], yours[name], rtol=0, atol=1e-5) for name in mine)
    assert results(out)["ema_eval_loss"] == pytest.approx(results(single)["ema_eval_loss"], abs=1e-5)
    mine, yours = (load_file(folder / "model.safetensors") for folder in (out, single))
    assert all(torch.allclose(mine[name], yours[name], rtol=0, atol=1e-5) for name in mine)


def test_zero3_refuses_it(harness, tiny_corpus, cache, tmp_path):
    yaml = fp32_copy("accelerate_configs/zero3.yaml", tmp_path)
    ranks = harness.launch(*command(tiny_corpus, cache, tmp_path / "zero3"), config=yaml)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "--ema_decay: DeepSpeed ZeRO-3" in ranks[0].stderr
