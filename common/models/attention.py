"""Attention paths, by their names in transformers' attention interface, so that its models use them unchanged.

B batch, A heads, N queries, S sequence, D head size.
"""

import functools

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface

FLEX_SHAPES = 32  # for which a kernel is made; a run has two in training and two in validation


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
    weights = torch.softmax(scores, dim=-1).to(value.dtype)  # computed in fp32 whatever the precision of the scores
    if dropout and module.training:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2), None


def static_flex_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention in a kernel that torch's compiler makes for the shapes of its inputs, and that skips masked blocks.

    On a CPU, where there is no backward pass, it is the same in plain operations.

    Args:
        module, query, key, value, scaling: as plain_attention; there is no dropout.
        attention_mask: None, or what same_document_blocks gives.
    Returns:
        as plain_attention.
    """
    as_it_is = torch.compiler.is_compiling() or query.device.type == "cpu"
    attend = flex_attention if as_it_is else _compiled_flex_attention()
    return attend(query, key, value, block_mask=attention_mask, scale=scaling).transpose(1, 2), None


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention, fullgraph=True, dynamic=False, recompile_limit=FLEX_SHAPES)


AttentionInterface.register("plain", plain_attention)
AttentionInterface.register("flex_attention", static_flex_attention)


def take(hidden, wanted):
    """Rows of `hidden` [B, S, H] at the positions `wanted` [B, N]: [B, N, H]."""
    return hidden.gather(1, wanted[:, :, None].expand(-1, -1, hidden.shape[-1]))


def project(layers, hidden, bias=None):
    """What linear layers of equal width make of the same input, by one matrix product.

    Args:
        layers: modules; hidden: [B, S, H].
        bias: of all of them together, where they have none of their own.
    Returns:
        their outputs, as a sequence of tensors.
    """
    plain = all(type(layer) is torch.nn.Linear and not hasattr(layer.weight, "device_mesh") for layer in layers)
    if not plain:  # fp8, or slices: a layer itself knows how to multiply by them
        outputs = [layer(hidden) for layer in layers]
        return outputs if bias is None else [output + bias.to(output.dtype) for output in outputs]
    weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
    bias = torch.cat([layer.bias for layer in layers]) if bias is None else bias
    return torch.nn.functional.linear(hidden, weight, bias).chunk(len(layers), dim=-1)


def same_document_mask(documents, dtype, wanted=None, window=None):
    """What to add to the scores in packed rows, so that positions attend to their own document alone.

    Added, not selected by: no path has to make it of a bool again in every layer, and it needs no backward pass.

    Args:
        documents: document_ids [B, S], integers, 0 = padding (which attends to padding).
        dtype: of the scores.
        wanted: positions of the queries in their row, [B, N] int64; None for all.
        window: how far away a key may be; None for any distance.
    Returns:
        [B, 1, N, S] of dtype: 0 within a document, the lowest finite number elsewhere.
    """
    of_queries = documents if wanted is None else documents.gather(1, wanted)
    other = of_queries[:, :, None] != documents[:, None, :]
    if window is not None:
        keys = torch.arange(documents.shape[1], device=documents.device)
        places = keys[None] if wanted is None else wanted
        other = other | ((places[:, :, None] - keys).abs() > window)
    mask = torch.zeros(other.shape, dtype=dtype, device=other.device)
    return mask.masked_fill_(other, torch.finfo(dtype).min)[:, None]


def same_document_blocks(documents, _, wanted=None, window=None):
    """As same_document_mask, for flex_attention: which blocks of scores there are at all, and a test within them.

    Args:
        documents, wanted, window: as same_document_mask. The test looks into them and into nothing made of them, which
            the compiler might not have in memory.
    Returns:
        torch.nn.attention.flex_attention.BlockMask of [B, 1, N, S].
    """

    def same_document(row, _, query, key):
        place = query if wanted is None else wanted[row, query]
        same = documents[row, place] == documents[row, key]
        return same if window is None else same & ((place - key).abs() <= window)

    rows, keys = documents.shape
    queries = keys if wanted is None else wanted.shape[1]
    return create_block_mask(same_document, rows, None, queries, keys, documents.device)


# The paths of a run, and the kind of mask that keeps documents apart on each of them.
MASKS = {"sdpa": same_document_mask, "plain": same_document_mask, "flex_attention": same_document_blocks}


def compute_dtype(device):
    """The precision of matrix products here and now: autocast's, or fp32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
