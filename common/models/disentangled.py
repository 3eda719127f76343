"""DeBERTa's attention, whose scores also compare contents with relative positions, in the form that any path computes.

What the two position terms add to the scores does not depend on the values, so it goes where a mask goes. A row of
scores against all distances becomes a row against all keys by moving it one place further than the row before: no
index is gathered, and none is scattered in the backward pass. Numbers are those of transformers.

B batch, S sequence, N wanted positions in a row, H hidden size, A heads, D head size, R relative embeddings.
Source: He et al. 2021 (arXiv:2006.03654), section 3.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from common.models.attention import project, take

# Of an attention module, by kind: the layers that relative embeddings go through as keys and as queries.
POSITION_LAYERS = {"v1": ("pos_proj", "pos_q_proj"), "v2": ("pos_key_proj", "pos_query_proj")}
SHARED_LAYERS = "key_proj", "query_proj"


class Relative(NamedTuple):
    """mask: as same_document_mask, or None. embeddings: [R, H], or None where there are no relative positions.
    of_keys, of_queries: [2S] int64, their rows by distance of a query behind a key: S - 1 to -S, and 1 - S to S."""

    mask: torch.Tensor | None
    embeddings: torch.Tensor | None
    of_keys: torch.Tensor | None = None
    of_queries: torch.Tensor | None = None


def relative_positions(encoder, length, device):
    """What every layer needs of relative positions.

    Args:
        encoder: stock encoder of either DeBERTa; length: S.
    Returns:
        (embeddings, of_keys, of_queries) of a Relative; empty where the model has none.
    """
    if not encoder.relative_attention:
        return (None,)
    span, buckets = encoder.max_relative_positions, getattr(encoder, "position_buckets", -1)
    places = torch.arange(2 * length, device=device)
    rows = []
    for distance in (length - 1 - places, places - (length - 1)):
        if buckets > 0:
            distance = make_log_bucket_position(distance, buckets, span).long()
        half = buckets if buckets > 0 else span
        rows.append((distance + half).clamp(0, 2 * half - 1))
    return encoder.get_rel_embedding(), *rows


def attend_disentangled(attention, path, hidden, relative, wanted):
    """Self-attention of all positions, or of some of them to all.

    Args:
        attention: stock DisentangledSelfAttention of either DeBERTa.
        path: function of transformers' attention interface that takes a mask with a gradient.
        hidden: [B, S, H]; relative: Relative; wanted: None for all, or [B, N] int64.
    Returns:
        [B, S, H], or [B, N, H].
    """
    query, key, value = _queries_keys_values(attention, hidden, wanted)
    kinds = [kind for kind in ("c2p", "p2c") if kind in attention.pos_att_type]
    scaling = ((1 + len(kinds)) * attention.attention_head_size) ** -0.5
    bias = relative.mask
    if relative.embeddings is not None:
        embeddings = attention.pos_dropout(relative.embeddings)
        of_keys, of_queries = _position_layers(attention)
        if "c2p" in kinds:
            scores = _against(query, of_keys(F.embedding(relative.of_keys, embeddings)), scaling)
            bias = _add(bias, _by_key(scores, wanted))
        if "p2c" in kinds:
            scores = _against(key, of_queries(F.embedding(relative.of_queries, embeddings)), scaling)
            bias = _add(bias, _by_query(scores, wanted))
    dropout = attention.dropout.p if attention.training else 0.0
    output, _ = path(attention, query, key, value, bias, dropout=dropout, scaling=scaling, is_causal=False)
    return output.flatten(2)


def encode(encoder, hidden, contexts, documents, wanted, numbers=None):
    """The layers of either DeBERTa.

    Args:
        encoder: stock encoder whose layers have the forward pass of common/models/layers.py.
        hidden: [B, S, H]; contexts: Relatives, for all positions and for those wanted.
        documents: [B, S] integers, for the convolution that the largest of v2 have; wanted: [B, N] int64.
        numbers: range of the layers to call, None for all.
    Returns:
        [B, S, H] or, where the last layer is among them, its output [B, N, H].
    """
    convolution, final = getattr(encoder, "conv", None), len(encoder.layer) - 1
    for number in range(final + 1) if numbers is None else numbers:
        layer = encoder.layer[number]
        if number == 0 and convolution is not None:
            hidden = _convolve(convolution, hidden, layer(hidden, contexts[0]), documents)
            if final == 0:
                hidden = take(hidden, wanted)
        elif number == final:
            hidden = layer(hidden, contexts[1], wanted)
        else:
            hidden = layer(hidden, contexts[0])
    return hidden


def _convolve(layer, embedded, hidden, documents):
    """Adds to the output [B, S, H] of the first layer a convolution of its input, each document by itself."""
    size, length = layer.conv.kernel_size[0], hidden.shape[1]
    reach = (size - 1) // 2
    around, theirs = F.pad(embedded, (0, 0, reach, reach)), F.pad(documents, (reach, reach), value=-1)
    places = [slice(place, place + length) for place in range(size)]
    parts = [around[:, place] * (theirs[:, place] == documents)[..., None] for place in places]
    added = F.linear(torch.cat(parts, dim=-1), layer.conv.weight.transpose(1, 2).flatten(1), layer.conv.bias)
    return layer.LayerNorm(hidden + getattr(F, layer.conv_act)(layer.dropout(added)))


def _queries_keys_values(attention, hidden, wanted):
    """[B, A, N or S, D], twice [B, A, S, D]."""
    if hasattr(attention, "in_proj"):  # of the first DeBERTa: for each head query, key and value, the key without bias
        heads = (attention.num_attention_heads, -1)
        of_query, of_value = (bias.unflatten(0, heads) for bias in (attention.q_bias, attention.v_bias))
        bias = torch.cat([of_query, torch.zeros_like(of_query), of_value], dim=1).flatten()
        joined = project([attention.in_proj], hidden, bias)[0].unflatten(-1, heads)
        query, key, value = joined.chunk(3, dim=-1)
        if wanted is not None:
            query = take(query.flatten(2), wanted).unflatten(-1, heads)
    else:
        heads = (-1, attention.attention_head_size)
        layers = [attention.query_proj, attention.key_proj, attention.value_proj]
        if wanted is None:
            parts = project(layers, hidden)
        else:
            parts = layers[0](take(hidden, wanted)), *project(layers[1:], hidden)
        query, key, value = (part.unflatten(-1, heads) for part in parts)
    return (part.transpose(1, 2) for part in (query, key, value))


def _position_layers(attention):
    if getattr(attention, "share_att_key", False):
        names = SHARED_LAYERS
    else:
        names = POSITION_LAYERS["v1" if hasattr(attention, "in_proj") else "v2"]
    return (getattr(attention, name, None) for name in names)


def _against(contents, positions, scaling):
    """Scores [B, A, n, 2S] of contents [B, A, n, D] against positions [2S, A * D]."""
    heads = positions.unflatten(-1, (contents.shape[1], -1)).permute(1, 2, 0)  # [A, D, 2S]
    scores = torch.bmm(contents.transpose(0, 1).flatten(1, 2), heads * scaling)  # [A, B * n, 2S]
    return scores.unflatten(1, (len(contents), -1)).transpose(0, 1)


def _by_key(scores, wanted):
    """Scores of queries against distances, [B, A, N or S, 2S], as scores against the keys: [B, A, N or S, S]."""
    if wanted is None:
        return _shift(scores)
    length = scores.shape[-1] // 2
    places = torch.arange(length, device=scores.device) - wanted[:, None, :, None] + length - 1
    return scores.gather(-1, places.expand(-1, scores.shape[1], -1, -1))


def _by_query(scores, wanted):
    """Scores of keys against distances, [B, A, S, 2S], as scores of the queries: [B, A, N or S, S]."""
    if wanted is None:
        return _shift(scores).transpose(-1, -2)
    length = scores.shape[-1] // 2
    places = wanted[:, None, None] - torch.arange(length, device=scores.device)[:, None] + length - 1
    return scores.gather(-1, places.expand(-1, scores.shape[1], -1, -1)).transpose(-1, -2)


def _shift(scores):
    """Of row i of [B, A, S, 2S], the S columns from S - 1 - i on."""
    length = scores.shape[-2]
    narrower = scores.flatten(2)[..., : length * (2 * length - 1)].unflatten(-1, (length, 2 * length - 1))
    return narrower[..., length - 1 :]


def _add(bias, scores):
    return scores if bias is None else scores + bias
