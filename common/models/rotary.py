"""ModernBERT's attention: positions turn queries and keys, and most layers look at the near keys alone.

B batch, S sequence, N wanted positions in a row, H hidden size, A heads, D head size.
Source: Warner et al. 2024 (arXiv:2412.13663), section 2.1; Su et al. 2021 (arXiv:2104.09864), section 3.4.2.
"""

from typing import NamedTuple

import torch

from common.models.attention import take


class Turned(NamedTuple):
    """What the layers of one type take. mask: of the path's kind, or None; cosine, sine: [B, S, D] float32, of the
    positions of keys."""

    mask: object
    cosine: torch.Tensor
    sine: torch.Tensor


def attend_rotary(attention, path, hidden, turned, wanted):
    """Self-attention of all positions, or of some of them to all.

    Args:
        attention: stock ModernBertAttention; path: function of transformers' attention interface.
        hidden: [B, S, H]; turned: Turned; wanted: None for all, or [B, N] int64.
    Returns:
        [B, S, H], or [B, N, H], before the output projection.
    """
    query, key, value = attention.Wqkv(hidden).chunk(3, dim=-1)
    cosine, sine = turned.cosine, turned.sine
    key = _turn(_heads(key, attention), cosine, sine)
    if wanted is not None:
        query, cosine, sine = (take(part, wanted) for part in (query, cosine, sine))
    query = _turn(_heads(query, attention), cosine, sine)
    dropout = attention.attention_dropout if attention.training else 0.0
    scaling, value = attention.head_dim**-0.5, _heads(value, attention)
    output, _ = path(attention, query, key, value, turned.mask, dropout=dropout, scaling=scaling, is_causal=False)
    return output.flatten(2)


def _heads(part, attention):
    return part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, A, S, D]


def _turn(part, cosine, sine):
    """Rotates the pairs (i, i + D/2) of [B, A, n, D] by the angles of [B, n, D]; in fp32, as transformers does."""
    first, second = part.float().chunk(2, dim=-1)
    turned = part * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]
    return turned.to(part.dtype)
