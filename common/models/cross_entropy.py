"""Cross-entropy of a linear layer's output over a large vocabulary, a chunk of positions at a time.

N positions, H hidden size, V vocabulary. The logits [N, V] would be the largest tensor of a step, and automatic
differentiation keeps three more of their size. Here there is one buffer for a chunk of them, which becomes its own
gradient in place, in the forward pass.
"""

import torch
import torch.nn.functional as F

from common.models.attention import compute_dtype

CHUNK_LOGITS = 1 << 24  # in one buffer: 64 MiB in fp32
LEAST_CHUNK = 16  # positions, however large the vocabulary


def chunk_size(vocab_size):
    """Positions in a chunk."""
    return max(LEAST_CHUNK, CHUNK_LOGITS // vocab_size)


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
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, weights)


def linear_losses(hidden, weight, bias, labels):
    """The cross-entropy at each position, and whether the best answer is right; without gradients.

    Args:
        hidden, weight, bias, labels: as linear_cross_entropy.
    Returns:
        (losses, correct): [N] float32, [N] bool.
    """
    parts, size = [], chunk_size(len(weight))
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
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        loss, size = hidden.new_zeros((), dtype=torch.float32), chunk_size(len(weight))
        for part in range(0, len(hidden), size):
            here = slice(part, part + size)
            states, targets, importance = hidden[here].to(compute), labels[here, None], weights[here, None]
            gradient = F.linear(states, head, head_bias).float()  # [chunk, V]
            gradient.sub_(gradient.amax(dim=-1, keepdim=True))
            wanted = gradient.gather(1, targets)
            gradient.exp_()
            total = gradient.sum(dim=-1, keepdim=True)
            loss += ((total.log() - wanted) * importance).sum()
            # d loss / d logits = weight * (softmax - one-hot)
            gradient.mul_(importance / total)
            gradient.scatter_add_(1, targets, -importance)
            if bias is not None:
                of_bias += gradient.sum(dim=0)
            gradient = gradient.to(compute)
            of_hidden[here] = gradient @ head
            if compute == of_weight.dtype:
                of_weight.addmm_(gradient.t(), states)
            else:
                of_weight += gradient.t() @ states
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = weight.dtype, bias if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx, scale):
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        of_bias = None if of_bias is None else (of_bias * scale).to(bias_dtype)
        return of_hidden * scale, (of_weight * scale).to(weight_dtype), of_bias, None, None
