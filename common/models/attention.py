"""Attention paths, registered with transformers' attention interface so that its models use them unchanged.

B batch, A heads, N queries, S sequence, D head size.
"""

import time

import torch
from transformers import AttentionInterface

from common.hardware import AUTOCAST

PATHS = ("sdpa", "plain")
MEASUREMENTS = 4  # of each path; the first one warms up
MEASURED_ROWS = 8  # on a CPU, where more would take long and tell no more
CLEARLY = 0.9  # what is this much faster than sdpa is chosen; a smaller difference is noise


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Attention as two matrix products and a softmax, in the precision of its inputs.

    On a CPU with bf16 matrix units, forward and backward together are three times as fast as
    scaled_dot_product_attention at short lengths, whose backward pass makes no use of them.

    Args:
        module: the calling layer; its training mode decides on dropout.
        query: [B, A, N, D]; key, value: [B, A, S, D].
        attention_mask: None, or what same_document_mask gives, in their precision.
        scaling: factor on the scores.
        dropout: probability in [0, 1).
    Returns:
        (output, None): output is [B, N, A, D], as the interface asks.
    """
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if dropout and module.training:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2), None


AttentionInterface.register("plain", plain_attention)


def same_document_mask(of_queries, of_keys, dtype):
    """What to add to the scores in packed rows, so that positions attend to their own document alone.

    Added, not selected by: no path has to make it of a bool again in every layer, and it needs no backward pass.

    Args:
        of_queries, of_keys: document_ids [B, N] and [B, S], integers, 0 = padding (which attends to padding).
        dtype: of the scores.
    Returns:
        [B, 1, N, S] of dtype: 0 within a document, the lowest finite number elsewhere.
    """
    other = of_queries[:, :, None] != of_keys[:, None, :]
    mask = torch.zeros(other.shape, dtype=dtype, device=other.device)
    return mask.masked_fill_(other, torch.finfo(dtype).min)[:, None]


def compute_dtype(device):
    """The precision of matrix products here and now: autocast's, or fp32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def fastest_attention(accelerator, config, rows, seq_length, packed):
    """Measure the attention paths on this device.

    Args:
        accelerator: for the device and the precision.
        config: of the model; rows: B; seq_length: S; packed: whether documents in a row must not see each other.
    Returns:
        (name, seconds): the path to take, and what forward and backward of one layer took by each of them.
    """
    device = accelerator.device
    rows = min(rows, MEASURED_ROWS) if device.type == "cpu" else rows
    dtype = AUTOCAST.get(accelerator.mixed_precision, torch.float32)
    heads = config.num_attention_heads
    shape = (rows, heads, seq_length, config.hidden_size // heads)
    inputs = [torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    documents = torch.arange(seq_length, device=device).expand(rows, -1) * 4 // seq_length
    mask = same_document_mask(documents, documents, dtype) if packed else None
    seconds = dict.fromkeys(PATHS, float("inf"))
    for _ in range(MEASUREMENTS):
        for name in PATHS:
            seconds[name] = min(seconds[name], _time(AttentionInterface()[name], inputs, mask))
    name = min(seconds, key=seconds.get)
    return (name if seconds[name] < CLEARLY * seconds["sdpa"] else "sdpa"), seconds


def _time(path, inputs, mask):
    module = torch.nn.Identity()
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    output, _ = path(module, *inputs, mask, scaling=inputs[0].shape[-1] ** -0.5, dropout=0.0, is_causal=False)
    torch.autograd.grad(output.sum(), inputs)
    wait()
    return time.perf_counter() - began
