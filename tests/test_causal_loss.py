"""The loss of a language model's head, a chunk of positions at a time: the plain one's numbers in little memory."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_loss_memory
from common.models import cross_entropy
from common.models.cross_entropy import LEAST_CHUNK, chunk_size, linear_cross_entropy, linear_losses

HIDDEN, VOCABULARY = 24, 97
OPT_VOCABULARY = 50272


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of LEAST_CHUNK positions in blocks of 5, so that few positions make many of them."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", 5 * VOCABULARY)
    assert chunk_size(VOCABULARY, torch.float32) == LEAST_CHUNK == 16


def case(positions, vocabulary=VOCABULARY, bias=True, width=HIDDEN):
    """Inputs that want a gradient, labels, and weights of which some are 0."""
    generator = torch.Generator().manual_seed(positions)
    sizes = [(positions, width), (vocabulary, width), (vocabulary,)][: 2 + bias]
    inputs = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator)
    weights[1::3] = 0
    return inputs, labels, weights


def plain(inputs, labels, weights):
    """The same with all logits at once."""
    logits = F.linear(*inputs).float()
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def ours(inputs, labels, weights):
    hidden, weight, *bias = inputs
    return linear_cross_entropy(hidden, weight, bias[0] if bias else None, labels, weights)


def loss_and_gradients(loss_of, inputs, labels, weights, scale=1.0):
    loss = loss_of(inputs, labels, weights)
    return loss.item(), torch.autograd.grad(scale * loss, inputs)


def assert_equal(inputs, labels, weights):
    loss, gradients = loss_and_gradients(ours, inputs, labels, weights, scale=3.0)
    expected, plain_gradients = loss_and_gradients(plain, inputs, labels, weights, scale=3.0)
    assert loss == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(gradients, plain_gradients, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not gradients[0][weights == 0].any() and gradients[0][weights > 0].any(dim=1).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 32, 50])
def test_it_equals_the_plain_loss(small_chunks, positions, bias):
    assert_equal(*case(positions, bias=bias))


def test_it_equals_the_plain_loss_at_opts_vocabulary():
    positions = 2 * chunk_size(OPT_VOCABULARY, torch.float32) + 5
    assert_equal(*case(positions, OPT_VOCABULARY, bias=False))


@pytest.mark.parametrize("positions", [1, 16, 50])
def test_losses_without_gradients_equal_the_plain_ones(small_chunks, positions):
    (hidden, weight, bias), labels, _ = case(positions)
    with torch.no_grad():
        logits = F.linear(hidden, weight, bias)
        labels[::2] = logits.argmax(dim=-1)[::2]
        losses, correct = linear_losses(hidden, weight, bias, labels)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, logits.argmax(dim=-1) == labels) and correct[::2].all()


@pytest.mark.parametrize("bias", [True, False])
def test_in_bf16_it_is_no_further_from_fp32_than_the_plain_loss(small_chunks, bias):
    inputs, labels, weights = case(50, bias=bias)
    exact_loss, exact = loss_and_gradients(plain, inputs, labels, weights)
    found = {}
    for loss_of in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = loss_and_gradients(loss_of, inputs, labels, weights)
        errors = [float((mine - right).norm() / right.norm()) for mine, right in zip(gradients, exact, strict=True)]
        found[loss_of] = [abs(loss / exact_loss - 1), *errors]
    print(f"relative errors in bf16 of loss and gradients: ours {found[ours]}, plain {found[plain]}")
    assert all(mine <= 1.05 * theirs for mine, theirs in zip(found[ours], found[plain], strict=True))
    assert all(0 < error < 0.02 for error in found[plain])


@pytest.mark.exhaustive
def test_its_memory_at_8192_tokens_is_a_tenth_of_the_plain_ones(harness):
    """Growth of a fresh process's peak over forward and backward; inputs and the head's gradient do not count."""
    measured = {}
    for name in bench_loss_memory.LOSSES:
        done = harness.command(sys.executable, "-m", "benchmarks.bench_loss_memory", "--measure", name).check()
        measured[name] = json.loads(done.stdout)
    print(measured)
    assert bench_loss_memory.TOKENS == 8192 and bench_loss_memory.VOCABULARY == OPT_VOCABULARY
    assert measured["plain"]["megabytes"] > 2 * 8192 * OPT_VOCABULARY * 4 / 1e6  # logits and their gradient
    assert measured["ours"]["megabytes"] <= measured["plain"]["megabytes"] / 10
    assert measured["ours"]["loss"] == pytest.approx(measured["plain"]["loss"], rel=1e-5)
