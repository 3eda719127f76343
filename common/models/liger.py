"""Liger's cross-entropy kernel (Triton) as the step of common/models/cross_entropy.py, on CUDA where it is installed.

Its kernel, and not its own fused linear layer: that one waits for the device in every call and takes no weights. Both
packages are optional, and imported where they are used alone. n positions, V vocabulary.
"""

from importlib.util import find_spec

import torch

from common.errors import UserError, first_line
from common.hardware import AUTOCAST
from common.models.cross_entropy import chunk_losses, use_step

PINNED = "liger_kernel==0.8.5"  # the release whose kernel is called here, with its arguments
CHECKED_ROWS = 48


@torch.library.custom_op("frugal::softmax_gradient", mutates_args={"logits"})
def softmax_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Turn logits into the gradient of the sum of their cross-entropies, which are returned.

    Opaque to torch's compiler.

    Args:
        logits: [n, V], overwritten; labels: [n] int64 in [0, V).
    Returns:
        [n] float32.
    """
    import triton
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    liger_cross_entropy_kernel[(rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=labels,
        Y_stride=labels.stride(0),
        weight_ptr=None,
        loss_ptr=losses,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocabulary,
        n_non_ignore=rows,
        sum_non_ignore_weight=rows,
        weight_sum=0.0,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=True,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, triton.next_power_of_2(vocabulary)),
        num_warps=16 if torch.version.hip else 32,
    )
    return losses


@softmax_gradient.register_fake
def _(logits, labels):
    return logits.new_empty(len(logits), dtype=torch.float32)


def liger_losses(logits, labels, weights):
    """As cross_entropy.chunk_losses; the gradient stays in the precision of the logits."""
    losses = softmax_gradient(logits, labels[:, 0])
    return losses[:, None] * weights, logits.mul_(weights)


def refuse_fused_loss(asked, device_type):
    """Raise UserError where --use_liger_kernel is `asked` for (true) and cannot be had on such a device."""
    if asked and (fault := _missing(device_type)):
        raise UserError(f"--use_liger_kernel true {fault}, or drop the flag")


def find_fused_loss(accelerator, vocab_size, compiled, asked, say):
    """Whether Liger's kernel is to be taken. Called on the main process; the others must be told.

    Args:
        accelerator: for the device and the precision; vocab_size: V; compiled: whether the run compiles its model.
        asked: as the flag; say: function that prints.
    Raises:
        UserError: asked for, and wrong here.
    """
    device, dtype = accelerator.device, AUTOCAST.get(accelerator.mixed_precision, torch.float32)
    if asked is False or _missing(device.type):
        return False
    step = torch.compile(liger_losses, fullgraph=True, dynamic=False) if compiled else liger_losses
    fault = _fault(step, vocab_size, device, dtype)
    if fault and asked:
        raise UserError(f"--use_liger_kernel true: Liger's kernel {fault}: drop the flag")
    say(f"loss: Liger's kernel is left out, it {fault}" if fault else "loss: Liger's kernel")
    return not fault


def use_fused_loss(fused):
    """Compute losses by Liger's kernel (True) or by our own operations. Before a model is compiled."""
    use_step(liger_losses if fused else chunk_losses)


def _missing(device_type):
    """What the kernel lacks on such a device, with the remedy; None where it can run."""
    if device_type != "cuda":
        return "needs CUDA: use a GPU"
    if not (find_spec("liger_kernel") and find_spec("triton")):
        return f"needs Liger's kernels: pip install {PINNED}"
    return None


def _fault(step, vocab_size, device, dtype):
    """What is wrong with a step on logits of this precision, in words that can follow its name; None where nothing is.

    Its losses and gradient are compared with those of ours.
    """
    random = torch.Generator().manual_seed(0)  # leaves the generators of the run as they are
    # so wide that a few classes have most of the probability, and the gradient is not the one-hot part alone
    logits = (5 * torch.randn(CHECKED_ROWS, vocab_size, generator=random)).to(device, dtype)
    labels = torch.randint(vocab_size, (CHECKED_ROWS, 1), generator=random)
    labels[0], labels[-1] = 0, vocab_size - 1
    weights = torch.rand(CHECKED_ROWS, 1, generator=random)
    weights[1::3] = 0
    labels, weights = labels.to(device), weights.to(device)
    bound = max(1e-5, 2 * torch.finfo(dtype).eps)  # the gradient is rounded twice
    try:
        found, expected = (function(logits.clone(), labels, weights) for function in (step, chunk_losses))
        pairs = zip(found, expected, strict=True)
        apart = [float((mine.float() - right).norm() / right.norm()) for mine, right in pairs]
        if not all(difference <= bound for difference in apart):  # or it is no number
            return "differs from ours by {:.0e} in the losses, {:.0e} in the gradient".format(*apart)
    except Exception as error:  # compilers and kernels fail in as many ways as there are of them
        return f"cannot run here ({type(error).__name__}: {first_line(error)})"
    return None
