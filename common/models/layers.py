"""Encoder layers for pretraining: stock transformers layers, with their parameters, names and hooks, and less work.

Query, key and value come from one matrix product, and the last layer computes only the positions that the head will
look at: keys and values of all, queries and everything after the attention of those alone. Numbers are the same.

B batch, S sequence, N wanted positions in a row, H hidden size, A heads, D head size.
"""

import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.models.albert.modeling_albert import AlbertLayer
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.deberta.modeling_deberta import DebertaLayer, DebertaLayerNorm
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer
from transformers.models.electra.modeling_electra import ElectraLayer
from transformers.models.megatron_bert.modeling_megatron_bert import MegatronBertLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

from common.models.attention import MASKS, project, take
from common.models.disentangled import attend_disentangled
from common.models.rotary import attend_rotary


def attend(attention, path, hidden, mask, wanted):
    """Self-attention of all positions, or of some of them to all.

    Args:
        attention: stock module with query, key and value layers.
        path: function of transformers' attention interface.
        hidden: [B, S, H].
        mask: None, or of the path's kind: which of the [B, 1, S, S] scores count ([B, 1, N, S] where some are wanted).
        wanted: None for all, or [B, N] int64.
    Returns:
        [B, S, H], or [B, N, H].
    """
    layers = [attention.query, attention.key, attention.value]
    if wanted is None:
        query, key, value = project(layers, hidden)
    else:
        key, value = project(layers[1:], hidden)
        query = attention.query(take(hidden, wanted))
    heads = (-1, attention.attention_head_size)
    query, key, value = (part.unflatten(-1, heads).transpose(1, 2) for part in (query, key, value))  # [B, A, S, D]
    dropout = (attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout).p
    dropout = dropout if attention.training else 0.0
    scaling = attention.attention_head_size**-0.5
    output, _ = path(attention, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False)
    return output.flatten(2)


class PostNormMixin:
    """A forward pass for layers with BERT's modules that computes what pretraining needs."""

    attend = staticmethod(attend)

    def forward(self, hidden, mask=None, wanted=None):
        """hidden [B, S, H]; mask and wanted as attend. Returns [B, S, H], or [B, N, H]."""
        residual = hidden if wanted is None else take(hidden, wanted)
        hidden = self.attend(self.attention.self, self.attention_path, hidden, mask, wanted)
        hidden = self.attention.output(hidden, residual)
        return self.output(self.intermediate(hidden), hidden)


class PreNormLayer(MegatronBertLayer):
    """A MegatronBertLayer whose forward computes what pretraining needs, by any attention path."""

    def forward(self, hidden, mask=None, wanted=None):
        """As PostNormMixin.forward."""
        residual = hidden if wanted is None else take(hidden, wanted)
        hidden = attend(self.attention.self, self.attention_path, self.attention.ln(hidden), mask, wanted)
        hidden = self.attention.output(hidden, residual)
        return self.output(self.intermediate(self.ln(hidden)), hidden)


class PostNormLayer(PostNormMixin, BertLayer):
    """A BertLayer."""


class RobertaPostNormLayer(PostNormMixin, RobertaLayer):
    """A RobertaLayer."""


class ElectraPostNormLayer(PostNormMixin, ElectraLayer):
    """An ElectraLayer."""


class DisentangledLayer(PostNormMixin, DebertaLayer):
    """A DebertaLayer; its mask is a Relative."""

    attend = staticmethod(attend_disentangled)


class DisentangledV2Layer(PostNormMixin, DebertaV2Layer):
    """A DebertaV2Layer; its mask is a Relative."""

    attend = staticmethod(attend_disentangled)


class FusedLayerNorm(DebertaLayerNorm):
    """The norm that the first DeBERTa computes in seven steps, in one."""

    def forward(self, hidden):
        """hidden [..., H]; the same of it."""
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.variance_epsilon)


class RotaryLayer(ModernBertEncoderLayer):
    """A ModernBertEncoderLayer whose forward computes what pretraining needs; its mask is a Turned by layer type."""

    def forward(self, hidden, mask=None, wanted=None):
        """As PostNormMixin.forward."""
        residual = hidden if wanted is None else take(hidden, wanted)
        turned = mask[self.attention_type]
        hidden = attend_rotary(self.attn, self.attention_path, self.attn_norm(hidden), turned, wanted)
        hidden = residual + self.attn.out_drop(self.attn.Wo(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class SharedLayer(AlbertLayer):
    """An AlbertLayer whose forward computes what pretraining needs; it is called several times."""

    def forward(self, hidden, mask=None, wanted=None):
        """As PostNormMixin.forward."""
        residual = hidden if wanted is None else take(hidden, wanted)
        attention = self.attention
        hidden = attend(attention, self.attention_path, hidden, mask, wanted)
        hidden = attention.LayerNorm(residual + attention.output_dropout(attention.dense(hidden)))
        return self.full_layer_layer_norm(self.ff_chunk(hidden) + hidden)


FAST = {
    BertLayer: PostNormLayer,
    MegatronBertLayer: PreNormLayer,
    RobertaLayer: RobertaPostNormLayer,
    ElectraLayer: ElectraPostNormLayer,
    AlbertLayer: SharedLayer,
    DebertaLayer: DisentangledLayer,
    DebertaLayerNorm: FusedLayerNorm,
    DebertaV2Layer: DisentangledV2Layer,
    ModernBertEncoderLayer: RotaryLayer,
}


def encoder_layers(model):
    """The layers of a stock model, each once; of one that says which layers it calls, those."""
    if hasattr(model, "called_layers"):
        return list(dict.fromkeys(model.called_layers()))
    encoder = getattr(model.base_model, "encoder", None)
    if encoder is None:
        return list(model.base_model.layers)
    if hasattr(encoder, "albert_layer_groups"):
        return [layer for group in encoder.albert_layer_groups for layer in group.albert_layers]
    return list(encoder.layer)


def make_fast(model):
    """Give the encoder layers of a stock model the forward passes above; use_attention must follow."""
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))


def use_attention(model, name):
    """Choose the attention path of all layers, by its name in transformers' interface, and the masks of its kind."""
    model.document_mask = MASKS[name]
    for layer in encoder_layers(model):
        layer.attention_path = AttentionInterface()[name]
