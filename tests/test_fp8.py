"""fp8 is refused where it cannot be had, trains as bf16 does, and keeps Hugging Face's names.

Where torchao is installed, its products are emulated on the CPU, under the YAML as it is shipped. A card's own are
compared where there is one.
"""

import importlib.metadata
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.utils.ao import convert_model_to_fp8_ao
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from causal import causal_run
from common.checkpoint import latest_checkpoint
from common.errors import UserError
from common.models.families import FAMILIES
from common.models.layers import make_fast, use_attention
from common.models.presets import model_shape
from common.parallel.fp8 import LEAST_CAPABILITY, TORCHAO, check_fp8, describe_layers, recipe
from fp8_emulated import emulated
from harness import REPOSITORY
from pretraining import assert_same_run, losses, results, small_run, wait_for_step, weights

YAML = "accelerate_configs/fp8.yaml"
FP8 = {"ACCELERATE_MIXED_PRECISION": "fp8"}  # as accelerate launch says it
TWO_SLICES = {"ROLE_NAME": "tensor_parallel size=2", "WORLD_SIZE": "2"}
torchao = pytest.mark.skipif(not find_spec("torchao"), reason=f"no torchao: pip install torchao=={TORCHAO}")
BF16_TOLERANCE = 5e-3  # of losses near 5.4, each operand of a product rounded to 3 or 2 bits behind the point


def without_precision(words):
    return [word for word in words if word != "--fp32"]


# ---- Refused, on any machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, flags, said",
    [
        ({"ROLE_NAME": "cpu"}, [], "fp8 needs a GPU, of compute capability 8.9 or more"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "not for deepspeed: choose accelerate_configs/fp8.yaml"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "not for fsdp: choose accelerate_configs/fp8.yaml"),
        (TWO_SLICES, [], "not for tensor_parallel: choose accelerate_configs/fp8.yaml"),
        ({}, ["--bf16"], "--bf16 contradicts the launcher's mixed_precision 'fp8'"),
        ({}, ["--fp32"], "--fp32 contradicts the launcher's mixed_precision 'fp8'"),
    ],
)
def test_fp8_is_refused(harness, tiny_corpus, cache, out, env, flags, said):
    words = [*without_precision(small_run(tiny_corpus, cache, out, steps=1)), *flags]
    result = harness.run(*words, env=FP8 | env).check(2)
    assert said in result.stderr and result.stderr.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    "backend, version, capability, said",
    [
        ("TE", TORCHAO, (9, 0), "fp8_config backend TE is not supported: set it to AO"),
        ("AO", None, (9, 0), f"torchao {TORCHAO}, which is not installed: pip install torchao=={TORCHAO}"),
        ("AO", "0.9.0", (9, 0), f"torchao {TORCHAO}, 0.9.0 is installed: pip install torchao=={TORCHAO}"),
        ("AO", TORCHAO, (8, 6), "NVIDIA A10 has 8.6"),
        ("AO", TORCHAO, (8, 9), None),
    ],
)
def test_a_machine_with_a_gpu_that_lacks_something_is_refused(monkeypatch, backend, version, capability, said):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", backend)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    if said is None:
        return check_fp8("plain", cpu=False)
    with pytest.raises(UserError) as refused:
        check_fp8("plain", cpu=False)
    assert said in str(refused.value)


SHELL = {
    "run_pretraining.sh": ["fp8", "0.001", "tiny"],
    "run_clm.sh": [8, 0, "125m", 1, "fp8"],
    "run_multi_node.sh": [0, 2, "127.0.0.1", 1, "fp8", "run_pretraining.py", "--output_dir", "out"],
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "script", ["run_pretraining.sh", *(pytest.param(s, marks=pytest.mark.exhaustive) for s in SHELL)]
)
def test_a_shell_script_ends_in_one_line(harness, tmp_path, script):
    env = {"FRUGAL_VENV": str(Path(sys.executable).parent.parent)}
    result = harness.command("bash", REPOSITORY / "scripts" / script, *SHELL[script], cwd=tmp_path, env=env).check(2)
    assert "error: fp8 needs a GPU" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# ---- Emulated -------------------------------------------------------------------------------------------------------


def mini_model():
    """bert-mini, as a run builds it, and a batch of 64 rows."""
    torch.manual_seed(0)
    shape = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 1024}
    model = FAMILIES["bert"].model(BertConfig(**model_shape("mini"), **shape))
    make_fast(model)
    use_attention(model, "sdpa")
    model.packs_documents = False
    rows, length, targets = 8, 64, 13  # 8 x 13 is no multiple of 16
    batch = {
        "input_ids": torch.randint(1024, (rows, length)),
        "position_ids": torch.arange(length).expand(rows, -1),
        "document_ids": torch.ones(rows, length, dtype=torch.int64),
        "masked_positions": torch.randint(length, (rows, targets)),
        "masked_labels": torch.randint(1024, (rows, targets)),
        "masked_weights": torch.ones(rows, targets),
        "loss_denominator": torch.tensor(float(rows * targets)),
    }
    return model, batch


def loss_and_gradient(model, batch):
    """Both, the gradient of all parameters in one vector."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@torchao
def test_what_accelerate_makes_of_bert_mini():
    """By the functions that accelerate's prepare() calls, on the layers whose products we would join in bf16."""
    from torchao.float8.float8_linear import Float8Linear

    model, batch = mini_model()
    exact, exact_gradient = loss_and_gradient(model, batch)
    names, parameters = list(model.state_dict()), list(model.parameters())
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")  # before, as the scripts do
    convert_model_to_fp8_ao(model, config=emulated(recipe()).config)
    assert list(model.state_dict()) == names
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))  # the optimizer's
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    in_bf16 = {name for name, kind in kinds.items() if kind is not Float8Linear}
    assert in_bf16 == {"bert.encoder.layer.0.attention.self.query", "cls.predictions.decoder"}
    assert describe_layers(model) == f"fp8: 24 of 26 linear layers; bf16: {', '.join(sorted(in_bf16))}"
    loss, gradient = loss_and_gradient(model, batch)
    apart = float((gradient - exact_gradient).norm() / exact_gradient.norm())
    print(f"loss {loss - exact:+.1e}, gradient {apart:.1e} apart from fp32")
    assert 1e-5 < abs(loss - exact) < 0.02
    assert 1e-3 < apart < 0.1 and gradient.isfinite().all()
    model._compiled_call_impl = None
    assert loss_and_gradient(model, batch)[0] == pytest.approx(loss, abs=1e-5)


@torchao
@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)),
        lambda: BertForMaskedLM(BertConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=2, vocab_size=64)),
    ],
)
def test_a_model_without_layers_for_fp8_is_refused(model):
    """One has no linear layers of torch's, one is too narrow for the cards' matrix units."""
    model = model()
    convert_model_to_fp8_ao(model, config=emulated(recipe()).config)
    with pytest.raises(UserError, match="fp8 finds no layer"):
        describe_layers(model)


def in_fp8(harness, words, num_processes=1):
    """Run a script under the YAML. Returns: what rank 0 printed."""
    ranks = harness.launch("tests/fp8_emulated.py", *words, config=YAML, num_processes=num_processes)
    for rank in ranks:
        rank.check()
    return ranks[0].stdout


def masked_run(corpus, cache, out, *flags):
    """20 steps of 16 rows, 4 micro-batches on one process, clipping active."""
    flags = ["--init_output_bias", "zeros", *flags]  # so that there is more to learn
    flags = ["--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--max_grad_norm", 0.2, *flags]
    return without_precision(small_run(corpus, cache, out, *flags, steps=20, batch=16))


@torchao
def test_a_run_is_near_bf16_and_its_checkpoint_is_hugging_faces(harness, tiny_corpus, cache, tmp_path):
    plain, one, two = (tmp_path / name for name in ("bf16", "one", "two"))
    harness.run(*masked_run(tiny_corpus, cache, plain), "--bf16").check()
    printed = in_fp8(harness, masked_run(tiny_corpus, cache, one))
    assert "strategy: single process, 1 process(es), fp8" in printed and "fp8: 12 of 14 linear layers" in printed
    assert results(one)["precision"] == "fp8"
    apart = max(abs(losses(one)[step] - losses(plain)[step]) for step in losses(plain))
    learned = losses(plain)[1] - losses(plain)[20]
    print(f"fp8 emulated: losses differ from bf16's by at most {apart:.1e}; bf16's fell by {learned:.2f}")
    assert 0 < apart < BF16_TOLERANCE and learned > 0.2
    assert results(one)["eval_loss"] == pytest.approx(results(plain)["eval_loss"], abs=BF16_TOLERANCE)
    assert weights(one).keys() == weights(plain).keys()
    assert all(tensor.dtype == torch.float32 for tensor in weights(one).values())
    _, info = AutoModelForMaskedLM.from_pretrained(one, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    in_fp8(harness, masked_run(tiny_corpus, cache, two), num_processes=2)
    assert results(two)["strategy"] == "data parallel (DDP)"
    assert losses(two) == pytest.approx(losses(one), abs=BF16_TOLERANCE)


@torchao
def test_a_killed_run_continues_bit_for_bit(harness, tiny_corpus, cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--hidden_dropout_prob", 0.1, "--checkpointing_steps", 3]
    in_fp8(harness, masked_run(tiny_corpus, cache, whole, *flags))
    words = masked_run(tiny_corpus, cache, killed, *flags)
    (process,) = harness.start_ranks("tests/fp8_emulated.py", *words, config=YAML, num_processes=1, pause_at=7)
    wait_for_step(process, killed, 7)
    process.signal(signal.SIGKILL)
    assert process.wait().returncode == -9 and latest_checkpoint(killed)
    in_fp8(harness, [*words, "--resume_from_checkpoint", "latest"])
    assert_same_run(whole, killed)


@torchao
def test_opt_is_near_bf16(harness, tiny_corpus, cache, tmp_path):
    plain, out = tmp_path / "bf16", tmp_path / "fp8"
    words = [without_precision(causal_run(tiny_corpus, cache, folder, steps=10)) for folder in (plain, out)]
    harness.run(*words[0], "--bf16").check()
    assert "fp8: 11 of 13 linear layers" in in_fp8(harness, words[1])
    assert losses(out) == pytest.approx(losses(plain), abs=BF16_TOLERANCE) and losses(out) != losses(plain)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


# ---- On a card ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@torchao
def test_on_a_card_a_run_is_near_bf16(harness, tiny_corpus, cache, tmp_path):
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        pytest.skip("the GPU has no fp8")
    for config in ("single_gpu", "fp8"):
        words = masked_run(tiny_corpus, cache, tmp_path / config)
        (rank,) = harness.launch(*words, config=f"accelerate_configs/{config}.yaml", num_processes=1)
        rank.check()
    plain, out = tmp_path / "single_gpu", tmp_path / "fp8"
    assert (results(plain)["precision"], results(out)["precision"]) == ("bf16", "fp8")
    apart = max(abs(losses(out)[step] - losses(plain)[step]) for step in losses(plain))
    print(f"fp8 on {torch.cuda.get_device_name()}: losses differ from bf16's by at most {apart:.1e}")
    assert apart < BF16_TOLERANCE and weights(out).keys() == weights(plain).keys()
