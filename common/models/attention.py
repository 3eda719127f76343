"""Attention paths, registered with transformers' attention interface so that its models use them unchanged.

B batch, A heads, S sequence, D head size.
"""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Attention as two matrix products and a softmax, in the precision of its inputs.

    On a CPU with bf16 matrix units, forward and backward together are three times as fast as
    scaled_dot_product_attention at short lengths, whose backward pass makes no use of them.

    Args:
        module: the calling layer; its training mode decides on dropout.
        query, key, value: [B, A, S, D].
        attention_mask: None, or [B, 1, S, S] bool, True where attention is allowed.
        scaling: factor on the scores.
        dropout: probability in [0, 1).
    Returns:
        (output, None): output is [B, S, A, D], as the interface asks.
    """
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if dropout and module.training:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2), None


AttentionInterface.register("plain", plain_attention)
AttentionMaskInterface.register("plain", sdpa_mask)


def same_document_mask(document_ids):
    """Who may attend to whom in packed rows: positions of the same document (padding only to padding).

    Args:
        document_ids: [B, S] integers, 0 = padding.
    Returns:
        [B, 1, S, S] bool.
    """
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]


def choose_attention(asked, device, precision):
    """The attention path for a run.

    Args:
        asked: "auto", or the path to use.
        device: torch.device; precision: accelerate's mixed_precision.
    """
    if asked != "auto":
        return asked
    return "plain" if device.type == "cpu" and precision == "bf16" else "sdpa"
