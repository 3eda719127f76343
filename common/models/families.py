"""The families that are pretrained: stock transformers classes, with the head and the loss on the masked positions.

B batch, S sequence, k masked positions in a row, n pairs of sentences in a row, H hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from common.models.attention import compute_dtype
from common.models.disentangled import Relative, encode, relative_positions
from common.models.electra import ReplacedTokensMixin
from common.models.head_loss import HeadLoss, head_loss
from common.models.rotary import Turned


class MaskedPositionsMixin:
    """Gives a stock masked-language model a forward pass that computes logits for the masked positions only."""

    packs_documents = True  # rows hold several documents that must not see each other
    draws_labels = True  # may take its loss at labels that it draws itself

    def forward(self, **batch):
        """Loss of a micro-batch.

        Args:
            batch: input_ids, position_ids, document_ids: [B, S] int64.
                masked_positions, masked_labels: [B, k] int64: where, and what was there.
                masked_weights: [B, k] float32: 1, or 0 for a position that only fills the shape.
                loss_denominator: scalar float32: the summed weight of the global batch over its number of
                micro-batches, so that the mean over micro-batches is the loss of the global batch however it was cut.
                label_keys: [B] int64, where labels are to be drawn, as head_loss.
        Returns:
            HeadLoss; outside training with `losses` and `correct`, [B, k].
        """
        return self.run_part(batch)

    def run_part(self, batch, hidden=None, layers=None):
        """What a part of the layers makes of a micro-batch: the first one embeds it, the last one judges it.

        Args:
            batch: as forward; hidden: [B, S, H] of the layer before, None where there is none.
            layers: range of the numbers of layers that are called, None for all.
        Returns:
            [B, S, H], or HeadLoss where the last layer is among them.
        """
        number = len(self.called_layers())
        layers = range(number) if layers is None else layers
        wanted = self._wanted(batch)  # where the last layer's output is looked at, [B, N] int64
        contexts = self._contexts(batch["document_ids"], batch["position_ids"], wanted)
        if layers.start == 0:
            hidden = self._embed(batch["input_ids"], batch["position_ids"], *self._types(batch))
        hidden = self._run_layers(hidden, contexts, batch["document_ids"], wanted, layers)
        return hidden if layers.stop < number else self._judge_all(self._last_norm(hidden), batch)

    def _wanted(self, batch):
        return batch["masked_positions"]

    def _types(self, batch):
        """What _embed takes beside ids and positions: none, or [B, S]."""
        return ()

    def _judge_all(self, hidden, batch):
        """HeadLoss of the encoder's output at the positions wanted, [B, N, H]."""
        targets = (batch[name] for name in ("masked_labels", "masked_weights", "loss_denominator"))
        return head_loss(self, self._transform(hidden).flatten(0, 1), *targets, batch.get("label_keys"))

    def _contexts(self, document_ids, position_ids, wanted):
        """What layers take beside their input: where all positions attend, and where those `wanted` [B, N] do."""
        if not self.packs_documents:
            return None, None
        dtype = compute_dtype(document_ids.device)
        return self.document_mask(document_ids, dtype), self.document_mask(document_ids, dtype, wanted)

    def _run_layers(self, hidden, contexts, document_ids, wanted, numbers=None):
        """What layers of these numbers (None: all) make of [B, S, H]; the last of all at the positions `wanted`."""
        layers = self.called_layers()
        for number in range(len(layers)) if numbers is None else numbers:
            last = number == len(layers) - 1
            hidden = layers[number](hidden, contexts[1], wanted) if last else layers[number](hidden, contexts[0])
        return hidden

    def _last_norm(self, hidden):
        encoder = self.base_model.encoder
        return encoder.ln(hidden) if hasattr(encoder, "ln") else hidden  # of the pre-norm family

    def called_layers(self):
        """The layers in the order in which they are called; one may be there several times."""
        return self.base_model.encoder.layer

    def _transform(self, hidden):
        """What the output embedding is multiplied with. Args: hidden: [B, k, H], of the encoder."""
        return self.cls.predictions.transform(hidden)

    def _embed(self, input_ids, position_ids, token_type_ids=None):
        embeddings = self.base_model.embeddings
        types = embeddings.token_type_embeddings
        of_type = types.weight[0] if token_type_ids is None else types(token_type_ids)
        of_place = embeddings.position_embeddings(position_ids) + of_type
        hidden = embeddings.word_embeddings(input_ids) + of_place
        if hasattr(embeddings, "LayerNorm"):  # the pre-norm family has it in its layers
            hidden = embeddings.LayerNorm(hidden)
        return embeddings.dropout(hidden)


class RobertaMixin(MaskedPositionsMixin):
    """The same for RoBERTa: positions are counted from behind the padding's id, and the head has other names."""

    def _embed(self, input_ids, position_ids):
        return super()._embed(input_ids, position_ids + first_position(self.config))

    def _transform(self, hidden):
        return self.lm_head.layer_norm(F.gelu(self.lm_head.dense(hidden)))


class AlbertMixin(MaskedPositionsMixin):
    """The same for ALBERT: narrow embeddings, and layers that share their parameters."""

    def _embed(self, *embedded):
        return self.base_model.encoder.embedding_hidden_mapping_in(super()._embed(*embedded))

    def called_layers(self):
        groups, layers = self.base_model.encoder.albert_layer_groups, self.config.num_hidden_layers
        chosen = (groups[number * len(groups) // layers] for number in range(layers))
        return [layer for group in chosen for layer in group.albert_layers]

    def _transform(self, hidden):
        head = self.predictions
        return head.LayerNorm(head.activation(head.dense(hidden)))


class SentencePairsMixin(MaskedPositionsMixin):
    """Gives a stock model with two heads the same forward pass, and the loss of the head that judges pairs."""

    draws_labels = False  # of two losses

    def forward(self, **batch):
        """Sum of the losses of a micro-batch, as in Devlin et al. 2019, appendix A.2.

        Args:
            batch: what MaskedPositionsMixin.forward takes, and
                token_type_ids: [B, S] int64.
                cls_positions, sentence_labels: [B, n] int64: where each pair begins, and whether B does not follow A.
                sentence_weights: [B, n] float32: 1 in training.
        Returns:
            HeadLoss; outside training with `losses` and `correct`, [B, k], and those of the pairs, [B, n].
        """
        return super().forward(**batch)

    def _wanted(self, batch):
        return torch.cat([batch["cls_positions"], batch["masked_positions"]], dim=1)

    def _types(self, batch):
        return (batch["token_type_ids"],)

    def _judge_all(self, hidden, batch):
        pairs, labels = batch["cls_positions"].shape[1], batch["sentence_labels"]
        output = super()._judge_all(hidden[:, pairs:], batch)
        logits = self._judge(hidden[:, :pairs]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view_as(batch["sentence_weights"])
        loss = output.loss + (losses * batch["sentence_weights"]).mean()  # every micro-batch has as many pairs
        if self.training:
            return HeadLoss(loss=loss)
        return HeadLoss(loss, output.losses, output.correct, losses, logits.argmax(-1) == labels)

    def _judge(self, hidden):
        """Logits of "B follows A" and of "it does not". Args: hidden: [B, n, H]. Returns: [B, n, 2]."""
        pooler = self.base_model.pooler
        return self.cls.seq_relationship(pooler.activation(pooler.dense(hidden)))


class AlbertPairsMixin(AlbertMixin, SentencePairsMixin):
    """The same for ALBERT."""

    def _judge(self, hidden):
        return self.sop_classifier(self.base_model.pooler_activation(self.base_model.pooler(hidden)))


class ElectraMixin(MaskedPositionsMixin):
    """The same for ELECTRA's generator: embeddings of another width than the layers are projected."""

    def _embed(self, *embedded):
        hidden = super()._embed(*embedded)
        body = self.base_model
        return body.embeddings_project(hidden) if hasattr(body, "embeddings_project") else hidden

    def _transform(self, hidden):
        return self.generator_predictions(hidden)


class ElectraPairMixin(ReplacedTokensMixin, ElectraMixin):
    """A discriminator with its generator."""

    draws_labels = False  # of two losses


class DebertaMixin(MaskedPositionsMixin):
    """The same for DeBERTa: relative positions in every layer; the embeddings have what the configuration says."""

    def _contexts(self, document_ids, position_ids, wanted):
        relative = relative_positions(self.base_model.encoder, document_ids.shape[1], document_ids.device)
        return [Relative(mask, *relative) for mask in super()._contexts(document_ids, position_ids, wanted)]

    def _run_layers(self, hidden, contexts, document_ids, wanted, numbers):
        documents = document_ids if self.packs_documents else torch.zeros_like(document_ids)
        return encode(self.base_model.encoder, hidden, contexts, documents, wanted, numbers)

    def _embed(self, input_ids, position_ids):
        return self.base_model.embeddings(input_ids=input_ids, position_ids=position_ids)


class ModernBertMixin(MaskedPositionsMixin):
    """The same for ModernBERT: positions are in the layers, most of which see no further than a window."""

    def _contexts(self, document_ids, position_ids, wanted):
        everywhere = self._masks(document_ids, wanted)
        near = self._masks(document_ids, wanted, self.config.sliding_window)
        numbers = torch.empty(0, device=document_ids.device)  # says in which precision, and where
        rotary = self.base_model.rotary_emb
        angles = {kind: rotary(numbers, position_ids, kind) for kind in rotary.layer_types}
        masks = {"full_attention": everywhere, "sliding_attention": near}
        return [{kind: Turned(masks[kind][which], *angles[kind]) for kind in angles} for which in range(2)]

    def _masks(self, document_ids, wanted, window=None):
        """Those of all positions and of the wanted, as super()._contexts where a window does not matter."""
        if window is None or window >= document_ids.shape[1] - 1:
            return super()._contexts(document_ids, None, wanted)
        documents = document_ids if self.packs_documents else torch.zeros_like(document_ids)
        dtype = compute_dtype(document_ids.device)
        return [self.document_mask(documents, dtype, places, window) for places in (None, wanted)]

    def _embed(self, input_ids, position_ids):
        return self.base_model.embeddings(input_ids)

    def called_layers(self):
        return self.base_model.layers

    def _last_norm(self, hidden):
        return self.base_model.final_norm(hidden)

    def _transform(self, hidden):
        return self.head(hidden)


class Family(NamedTuple):
    """config: its configuration class; model: the class that is trained; published: what its published models have and
    its configuration does not by itself; pairs: the class with a head that judges pairs of sentences, where there is
    one; renamed: names of weights in some checkpoints, and what they are here; settings: of its configuration, by
    BERT's names for them."""

    config: type
    model: type
    published: dict = {}
    pairs: type | None = None
    renamed: dict = {}
    settings: dict = {}

    def translate(self, **settings):
        """Settings by BERT's names as this family's configuration takes them."""
        named = ((name, value) for given, value in settings.items() for name in self.settings.get(given, (given,)))
        return dict(named)


def _with_masked_positions(mixin, stock):
    # The same class name, because save_pretrained writes it into config.json.
    return type(stock.__name__, (mixin, stock), {"__module__": __name__})


DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}
DEBERTA_V3 = {"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True}
# DeBERTa's own head has the shape of the one that transformers calls legacy, under other names
DEBERTA_HEAD = {
    r"^lm_predictions\.lm_head\.(dense|LayerNorm)": r"cls.predictions.transform.\1",
    r"^lm_predictions\.lm_head\.bias": "cls.predictions.bias",
}

MODERNBERT_SETTINGS = {
    "hidden_act": ("hidden_activation",),
    "hidden_dropout_prob": ("embedding_dropout", "mlp_dropout"),
    "attention_probs_dropout_prob": ("attention_dropout",),
}
ElectraPairMixin.generator_class = _with_masked_positions(ElectraMixin, ElectraForMaskedLM)
NO_SPECIAL_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))

FAMILIES = {
    "bert": Family(
        BertConfig,
        _with_masked_positions(MaskedPositionsMixin, BertForMaskedLM),
        pairs=_with_masked_positions(SentencePairsMixin, BertForPreTraining),
    ),
    "megatron-bert": Family(
        MegatronBertConfig,
        _with_masked_positions(MaskedPositionsMixin, MegatronBertForMaskedLM),
        pairs=_with_masked_positions(SentencePairsMixin, MegatronBertForPreTraining),
    ),
    "roberta": Family(
        RobertaConfig,
        _with_masked_positions(RobertaMixin, RobertaForMaskedLM),
        {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "albert": Family(
        AlbertConfig,
        _with_masked_positions(AlbertMixin, AlbertForMaskedLM),
        pairs=_with_masked_positions(AlbertPairsMixin, AlbertForPreTraining),
    ),
    "deberta": Family(
        DebertaConfig, _with_masked_positions(DebertaMixin, DebertaForMaskedLM), DEBERTA, renamed=DEBERTA_HEAD
    ),
    "deberta-v2": Family(
        DebertaV2Config,
        _with_masked_positions(DebertaMixin, DebertaV2ForMaskedLM),
        DEBERTA | DEBERTA_V3,
        renamed=DEBERTA_HEAD,
    ),
    "electra": Family(ElectraConfig, _with_masked_positions(ElectraPairMixin, ElectraForPreTraining)),
    "modernbert": Family(
        ModernBertConfig,
        _with_masked_positions(ModernBertMixin, ModernBertForMaskedLM),
        NO_SPECIAL_TOKENS,
        settings=MODERNBERT_SETTINGS,
    ),
}


def first_position(config):
    """The row of the position embedding that the first token of a text has."""
    return config.pad_token_id + 1 if config.model_type == "roberta" else 0


def positions(config):
    """How many tokens a model of this configuration can read."""
    return config.max_position_embeddings - first_position(config)


def judges_tokens(config):
    """Whether tokens that are not masked are judged, too: replaced-token detection."""
    return config.model_type == "electra"


def has_position_scores(config):
    """Whether attention adds scores with a gradient of their own, which not every path takes."""
    return getattr(config, "relative_attention", False)


def has_unknown_parts(config):
    """Whether a configuration asks for what no forward pass here computes: no published model does."""
    return bool(getattr(config, "talking_head", False)) or getattr(config, "conv_groups", 1) != 1


def attention_dropout(config):
    """The probability, under whichever name its family has."""
    (name,) = FAMILIES[config.model_type].translate(attention_probs_dropout_prob=None)
    return getattr(config, name)
