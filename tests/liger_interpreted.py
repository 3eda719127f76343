"""Liger's kernel in Triton's interpreter, on a CPU: how far its loss and gradients are from ours and from plain ones.

python tests/liger_interpreted.py     # prints JSON; a process of its own: Triton reads the variable at import
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

from common.models import cross_entropy, liger

SHAPES = {"bias": (50, 24, 97, True), "no bias": (40, 32, 1000, False)}
VOCABULARIES = (1000, 40000)  # a row in one block of the kernel, and in two


def apart(found, expected):
    """The largest difference of loss and gradients, relative to the largest number of each."""
    pairs = zip(found, expected, strict=True)
    return max(float((mine - right).abs().max() / right.abs().max()) for mine, right in pairs)


def loss_and_gradients(loss_of, inputs, *others):
    bias = inputs[2] if len(inputs) > 2 else None
    loss = loss_of(*inputs[:2], bias, *others)
    return [loss.detach(), *torch.autograd.grad(3 * loss, inputs)]


def plain(hidden, weight, bias, labels, weights):
    return (F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none") * weights).sum()


def measure(positions, width, vocabulary, bias):
    """Returns: {"eager ours": the difference, ...} for a compiled loss too, and against the plain one."""
    random = torch.Generator().manual_seed(0)
    sizes = [(positions, width), (vocabulary, width), (vocabulary,)][: 2 + bias]
    inputs = [torch.randn(size, generator=random).requires_grad_() for size in sizes]
    labels = torch.randint(vocabulary, (positions,), generator=random)
    weights = torch.rand(positions, generator=random)
    weights[1::3] = 0
    of = (inputs, labels, weights)
    expected = {"plain": loss_and_gradients(plain, *of)}
    expected["ours"] = loss_and_gradients(cross_entropy.linear_cross_entropy, *of)
    liger.use_fused_loss(True)
    whole = torch.compile(cross_entropy.linear_cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager")
    found = {"eager": cross_entropy.linear_cross_entropy, "compiled": whole}
    found = {name: loss_and_gradients(loss_of, *of) for name, loss_of in found.items()}
    liger.use_fused_loss(False)
    again = loss_and_gradients(cross_entropy.linear_cross_entropy, *of)
    assert all(map(torch.equal, again, expected["ours"])) and not torch.equal(again[1], found["eager"][1])
    return {f"{name} {other}": apart(found[name], expected[other]) for name in found for other in expected}


def fp16_errors():
    """Returns: {"liger": relative errors of loss and gradients under autocast, "plain": the same of plain operations}.

    In fp16, as Triton's interpreter cuts to bf16 where a GPU rounds. The weights are those of a run, 0 and 1.
    """
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=random).requires_grad_() for size in ((400, 24), (97, 24), (97,))]
    labels, weights = torch.randint(97, (400,), generator=random), torch.ones(400)
    weights[1::3] = 0
    of = (inputs, labels, weights)
    exact, found = loss_and_gradients(plain, *of), {}
    liger.use_fused_loss(True)
    for name, loss_of in {"liger": cross_entropy.linear_cross_entropy, "plain": plain}.items():
        with torch.autocast("cpu", torch.float16):
            numbers = loss_and_gradients(loss_of, *of)
        found[name] = [float((mine - right).norm() / right.norm()) for mine, right in zip(numbers, exact, strict=True)]
    return found


if __name__ == "__main__":
    cross_entropy.CHUNK_BYTES = 1  # chunks of LEAST_CHUNK positions
    differences = {name: measure(*shape) for name, shape in SHAPES.items()}
    precisions = (torch.float32, torch.bfloat16, torch.float16)
    trials = [(vocabulary, torch.device("cpu"), dtype) for vocabulary in VOCABULARIES for dtype in precisions]
    faults = [liger._fault(liger.liger_losses, *trial) for trial in trials]
    print(json.dumps({"differences": differences, "faults": faults, "fp16": fp16_errors()}))
