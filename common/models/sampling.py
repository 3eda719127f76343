"""Tokens drawn from what a model's head gives them, without torch's generators and without all logits at once.

N positions, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F

from common.models.attention import compute_dtype
from common.models.cross_entropy import chunk_size, even_slices

BLOCK_NUMBERS = 1 << 17  # of noise, on a CPU: what they are made from stays in its cache
# SplitMix64's numbers, as int64 has them
GOLDEN, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@torch.no_grad()
def sample_tokens(hidden, weight, bias, keys):
    """Draw a token at each position from the distribution that a linear layer gives it.

    The largest of the logits and Gumbel noise is such a draw (Maddison et al. 2014, arXiv:1411.0030), and of all ways
    the one that rounding changes least. Nothing is drawn from torch's generators.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None; under autocast the product runs in its precision.
        keys: [N] int64: equal ones with equal logits draw the same.
    Returns:
        [N] int64.
    """
    compute, size = compute_dtype(hidden.device), chunk_size(len(weight), torch.float32)
    block = max(1, BLOCK_NUMBERS // len(weight)) if hidden.device.type == "cpu" else size
    weight, drawn = weight.to(compute), []
    for here in even_slices(len(hidden), size):
        logits, of_chunk = F.linear(hidden[here].to(compute), weight), keys[here]
        for some in even_slices(len(logits), block):
            noise = gumbel_noise(of_chunk[some], len(weight))
            scores = noise.add_(logits[some]) if bias is None else noise.add_(logits[some]).add_(bias)
            drawn.append(scores.argmax(dim=-1))
    return torch.cat(drawn)


def gumbel_noise(keys, size):
    """Gumbel noise that is a function of a key and a place alone, on every device.

    Args:
        keys: [N] int64; size: numbers of each.
    Returns:
        [N, size] float32, of 31 bits each.
    """
    bits = random_bits(keys, (size + 1) // 2)
    share = (bits.view(torch.int32)[:, :size] & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    # near 0 these numbers are exact, near 1 they are not: the largest noise comes from those near 0
    return share.neg_().log1p_().neg_().log_().neg_()


def random_bits(keys, size):
    """Those of common.data.masking, on any device: of each key the numbers at places 0 to size - 1.

    Args:
        keys: [N] int64.
    Returns:
        [N, size] int64.
    """
    bits = keys[:, None] + GOLDEN * torch.arange(1, size + 1, device=keys.device)
    for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
        bits ^= (bits >> shift) & ((1 << (64 - shift)) - 1)  # without the copies of the sign
        if factor:
            bits *= factor
    return bits
