"""Cross-entropy of a linear layer's output over a large vocabulary, a chunk of positions at a time.

N positions, H hidden size, V vocabulary. The logits [N, V] would be the largest tensor of a step, and automatic
differentiation keeps three more of their size. Here there is one buffer for a chunk of them, which becomes its own
gradient in place, in the forward pass; on a CPU some rows at a time, which stay in the processor's cache meanwhile.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from common.models.attention import compute_dtype

CHUNK_BYTES = 1 << 26  # of logits in one buffer
LEAST_CHUNK = 16  # positions, however large the vocabulary
BLOCK_LOGITS = 1 << 19  # in fp32, on a CPU: 2 MiB for its cores together


def chunk_size(vocab_size, dtype):
    """Most positions in a chunk. Args: vocab_size: V; dtype: of the logits."""
    return max(LEAST_CHUNK, CHUNK_BYTES // (vocab_size * dtype.itemsize))


def linear_cross_entropy(hidden, weight, bias, labels, weights):
    """Weighted sum of the cross-entropies of hidden @ weight.T + bias, for training.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None. Under autocast the products run in its precision, the rest
            in fp32.
        labels: [N] int64 in [0, V).
        weights: [N] float32, without a gradient.
    Returns:
        scalar float32.
    """
    arguments = hidden, weight, bias, labels, weights
    if has_torch_function(arguments):  # of parameters that something wants to prepare before they are used
        return handle_torch_function(linear_cross_entropy, arguments, *arguments)
    return _LinearCrossEntropy.apply(*arguments)


def chunk_losses(logits, labels, weights):
    """Weighted cross-entropies of n positions, and their gradient in the place of the logits.

    Args:
        logits: [n, V], overwritten; labels: [n, 1] int64; weights: [n, 1] float32.
    Returns:
        (losses, gradient): [n, 1] float32; [n, V] of float32 (another step may leave it in the logits' precision).
    """
    logits = logits.float()
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    wanted = logits.gather(1, labels)
    logits.exp_()
    total = logits.sum(dim=-1, keepdim=True)
    losses = (total.log() - wanted) * weights
    # d loss / d logits = weight * (softmax - one-hot)
    logits.mul_(weights / total)
    logits.scatter_add_(1, labels, -weights)
    return losses, logits


_step = chunk_losses


def use_step(step):
    """From now on take chunks through `step`, a function as chunk_losses. Before a model is compiled."""
    global _step
    _step = step


def linear_losses(hidden, weight, bias, labels):
    """The cross-entropy at each position, and whether the best answer is right; without gradients.

    Args:
        hidden, weight, bias, labels: as linear_cross_entropy.
    Returns:
        (losses, correct): [N] float32, [N] bool.
    """
    parts, size = [], chunk_size(len(weight), torch.float32)
    for part in range(0, len(hidden), size):
        here = slice(part, part + size)
        logits = F.linear(hidden[here], weight, bias).float()
        losses = F.cross_entropy(logits, labels[here], reduction="none")
        parts.append((losses, logits.argmax(-1) == labels[here]))
    losses, correct = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, weights):
        compute = compute_dtype(hidden.device) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        head, head_bias = weight.to(compute), None if bias is None else bias.to(compute)
        on_cpu = hidden.device.type == "cpu"
        chunks = even_slices(len(hidden), chunk_size(len(weight), compute))
        # all that stays first: what comes and goes would leave gaps below it
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32 if len(chunks) > 1 else compute)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for here in chunks:
            states, targets, importance = hidden[here].to(compute), labels[here, None], weights[here, None]
            # on a CPU a bias doubles the time of this product; in the blocks there it costs next to nothing
            logits = F.linear(states, head, None if on_cpu else head_bias)
            positions = BLOCK_LOGITS // len(weight) if on_cpu else len(states)
            for some in even_slices(len(states), max(1, positions)):
                block = logits[some]
                if on_cpu and bias is not None:
                    block = block.float().add_(bias)
                losses, gradient = _step(block, targets[some], importance[some])
                loss += losses.sum()
                if bias is not None:
                    of_bias += gradient.sum(dim=0, dtype=torch.float32)
                if gradient.dtype != logits.dtype:  # else it is in their place already
                    logits[some] = gradient
            of_hidden[here] = logits @ head
            if compute == of_weight.dtype:
                of_weight.addmm_(logits.t(), states)
            else:
                of_weight += logits.t() @ states
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = weight.dtype, bias if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx, scale):
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        of_bias = None if of_bias is None else (of_bias * scale).to(bias_dtype)
        # of one chunk it is in the precision of the product
        of_weight = of_weight * scale if of_weight.dtype == torch.float32 else of_weight.float().mul_(scale)
        return of_hidden * scale, of_weight.to(weight_dtype), of_bias, None, None


def even_slices(total, most):
    """Slices that cut `total` into as few parts of nearly equal size as there can be with at most `most` in each."""
    parts = -(-total // most)
    ends = [total * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]
