"""Liger's kernel for the loss: equal to ours where its packages are, left out in one line where it is wrong."""

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from causal import causal_run
from common.errors import UserError
from common.models import cross_entropy, liger
from harness import REPOSITORY
from pretraining import small_run

installed = pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")),
    reason=f"no Triton, or no Liger: pip install {liger.PINNED} triton",
)
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")


@installed
def test_in_tritons_interpreter_it_equals_ours_and_the_plain_loss(harness):
    done = harness.command(sys.executable, REPOSITORY / "tests" / "liger_interpreted.py").check()
    found = json.loads(done.stdout)
    print(found)
    assert set(found["differences"]) == {"bias", "no bias"}
    for differences in found["differences"].values():
        assert set(differences) == {"eager plain", "eager ours", "compiled plain", "compiled ours"}
        assert max(differences.values()) <= 1e-5
    assert found["faults"] == [None] * 6
    pairs = zip(found["fp16"]["liger"], found["fp16"]["plain"], strict=True)
    assert all(0 < mine <= 1.05 * theirs < 0.02 for mine, theirs in pairs)


def scaled(logits, labels, weights):
    losses, gradient = cross_entropy.chunk_losses(logits, labels, weights)
    return losses, gradient.mul_(1.01)


def unweighted(logits, labels, weights):
    return cross_entropy.chunk_losses(logits, labels, torch.ones_like(weights))


def without_softmax(logits, labels, weights):
    losses, gradient = cross_entropy.chunk_losses(logits, labels, weights)
    return losses, gradient.zero_().scatter_(1, labels, -weights)


def no_numbers(logits, labels, weights):
    return weights * float("nan"), logits.float()


def broken(logits, labels, weights):
    raise ValueError("no kernel for this device\nand more lines")


WRONG = {
    scaled: "differs from ours by 0e+00 in the losses, 1e-02 in the gradient",
    unweighted: "differs from ours by",
    without_softmax: "differs from ours by 0e+00 in the losses",
    no_numbers: "differs from ours by nan",
    broken: "cannot run here (ValueError: no kernel for this device)",
}


@pytest.fixture
def available(monkeypatch):
    """As on CUDA with both packages; what the kernel does is for the test to say."""
    monkeypatch.setattr(liger, "_missing", lambda device_type: None)


@pytest.mark.parametrize("step", WRONG)
def test_a_wrong_kernel_is_left_out_in_one_line(available, monkeypatch, step):
    monkeypatch.setattr(liger, "liger_losses", step)
    said = []
    assert liger.find_fused_loss(ACCELERATOR, 1000, False, None, said.append) is False
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith(f"loss: Liger's kernel is left out, it {WRONG[step]}")
    with pytest.raises(UserError, match="^--use_liger_kernel true: Liger's kernel .*: drop the flag$"):
        liger.find_fused_loss(ACCELERATOR, 1000, False, True, said.append)
    assert liger.find_fused_loss(ACCELERATOR, 1000, False, False, said.append) is False and len(said) == 1


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_right_kernel_is_taken_and_named(available, monkeypatch, precision):
    def right(logits, labels, weights):  # rounded as Liger's
        losses, gradient = cross_entropy.chunk_losses(logits, labels, torch.ones_like(weights))
        return losses * weights, gradient.to(logits.dtype).mul_(weights)

    monkeypatch.setattr(liger, "liger_losses", right)
    accelerator, said = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision), []
    for asked in (None, True):
        assert liger.find_fused_loss(accelerator, 1000, False, asked, said.append) is True
    assert said == ["loss: Liger's kernel"] * 2


def test_on_a_cpu_nothing_is_said_and_ours_is_taken(monkeypatch):
    said = []
    assert liger.find_fused_loss(ACCELERATOR, 1000, False, None, said.append) is False and said == []
    liger.use_fused_loss(False)
    assert cross_entropy._step is cross_entropy.chunk_losses and "liger_kernel" not in sys.modules


@pytest.mark.parametrize("small", [small_run, causal_run])
@pytest.mark.parametrize("flags", [[], ["--check_arguments"]])
def test_asked_for_on_a_cpu_it_is_refused(harness, tiny_corpus, cache, out, small, flags):
    words = small(tiny_corpus, cache, out, "--use_liger_kernel", "true", *flags, steps=2)
    result = harness.run(*words).check(2)
    assert result.stderr == "error: --use_liger_kernel true needs CUDA: use a GPU, or drop the flag\n"
    assert not out.exists()


def test_where_its_packages_are_missing_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    liger.refuse_fused_loss(None, "cuda")
    with pytest.raises(UserError, match="--use_liger_kernel true needs .*pip install liger_kernel==0.8.5"):
        liger.refuse_fused_loss(True, "cuda")
