"""Cross-entropy of a linear layer's output over a large vocabulary, in one buffer.

N positions, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F


def linear_cross_entropy(hidden, weight, bias, labels, weights):
    """Weighted sum of the cross-entropies of hidden @ weight.T + bias.

    The logits [N, V] are the largest tensor of a step. They become their own gradient in place, in the forward pass,
    where automatic differentiation would keep three more of their size and go over them five times more.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V]. Under autocast the products run in its precision, the rest in fp32.
        labels: [N] int64 in [0, V).
        weights: [N] float32, without a gradient.
    Returns:
        scalar float32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, weights)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, weights):
        output = F.linear(hidden, weight, bias)  # [N, V]
        compute = output.dtype
        gradient = output.float()
        highest = gradient.amax(dim=-1, keepdim=True)
        labels = labels[:, None]
        gradient.sub_(highest)
        wanted = gradient.gather(1, labels)
        gradient.exp_()
        total = gradient.sum(dim=-1, keepdim=True)
        losses = (total.log() - wanted)[:, 0]
        # d loss / d logits = weight * (softmax - one-hot)
        gradient.mul_(weights[:, None] / total)
        gradient.scatter_add_(1, labels, -weights[:, None])
        ctx.save_for_backward(hidden, weight, gradient.to(compute))
        ctx.bias_dtype = bias.dtype
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx, scale):
        hidden, weight, gradient = ctx.saved_tensors
        of_hidden = (gradient @ weight.to(gradient.dtype)) * scale
        of_weight = gradient.t() @ (hidden * scale).to(gradient.dtype)
        of_bias = gradient.sum(dim=0, dtype=torch.float32) * scale
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), of_bias.to(ctx.bias_dtype), None, None
