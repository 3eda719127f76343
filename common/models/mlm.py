"""Masked-language models: stock transformers classes, with the head and the loss on the masked positions alone.

B batch, S sequence, k masked positions in a row, H hidden size, V vocabulary.
"""

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BertConfig, BertForMaskedLM, MegatronBertConfig, MegatronBertForMaskedLM

from common.data.tokenizers import vocabulary_size
from common.errors import UserError, first_line
from common.models.attention import compute_dtype
from common.models.head_loss import head_loss
from common.models.layers import make_fast, use_attention

LEAST_POSITIONS = 512  # what users of BERT expect to be able to feed it, whatever it was trained on
VOCAB_MULTIPLE = 64  # embedding rows: matrix units like round numbers


class MaskedPositionsMixin:
    """Gives a stock masked-language model a forward pass that computes logits for the masked positions only."""

    packs_documents = True  # rows hold several documents that must not see each other

    def forward(
        self, input_ids, position_ids, document_ids, masked_positions, masked_labels, masked_weights, loss_denominator
    ):
        """Loss of a micro-batch.

        Args:
            input_ids, position_ids, document_ids: [B, S] int64.
            masked_positions, masked_labels: [B, k] int64: where, and what was there.
            masked_weights: [B, k] float32: 1, or 0 for a position that only fills the shape.
            loss_denominator: scalar float32: the summed weight of the global batch over its number of micro-batches,
                so that the mean over micro-batches is the loss of the global batch however it was cut.
        Returns:
            HeadLoss; outside training with `losses` and `correct`, [B, k].
        """
        mask = mask_of_masked = None
        if self.packs_documents:
            dtype = compute_dtype(document_ids.device)
            mask = self.document_mask(document_ids, dtype)
            mask_of_masked = self.document_mask(document_ids, dtype, masked_positions)
        hidden = self._embed(input_ids, position_ids)  # [B, S, H]
        *layers, last = self.base_model.encoder.layer
        for layer in layers:
            hidden = layer(hidden, mask)
        hidden = last(hidden, mask_of_masked, masked_positions)  # [B, k, H]
        if hasattr(self.base_model.encoder, "ln"):  # of the pre-norm family
            hidden = self.base_model.encoder.ln(hidden)
        hidden = self.cls.predictions.transform(hidden).flatten(0, 1)
        return head_loss(self, hidden, masked_labels, masked_weights, loss_denominator)

    def _embed(self, input_ids, position_ids):
        embeddings = self.base_model.embeddings
        of_place = embeddings.position_embeddings(position_ids) + embeddings.token_type_embeddings.weight[0]
        hidden = embeddings.word_embeddings(input_ids) + of_place
        if hasattr(embeddings, "LayerNorm"):  # the pre-norm family has it in its layers
            hidden = embeddings.LayerNorm(hidden)
        return embeddings.dropout(hidden)


def _with_masked_positions(stock):
    # The same class name, because save_pretrained writes it into config.json.
    return type(stock.__name__, (MaskedPositionsMixin, stock), {"__module__": __name__})


FAMILIES = {
    "bert": (BertConfig, _with_masked_positions(BertForMaskedLM)),
    "megatron-bert": (MegatronBertConfig, _with_masked_positions(MegatronBertForMaskedLM)),
}


def build_mlm_model(model_args, data_args, tokenizer):
    """Build the model of a run, with random weights or from existing ones.

    Args:
        model_args: common.arguments.ModelArguments.
        tokenizer: its size is the least vocabulary; its special ids go into the configuration.
        data_args: common.arguments.DataArguments, for the length of rows and how they are packed.
    Returns:
        a stock transformers model whose forward is MaskedPositionsMixin's, with sdpa attention until use_attention.
    Raises:
        UserError: a vocabulary or a sequence length that does not fit, weights that cannot be loaded.
    """
    max_seq_length = data_args.max_seq_length
    if model_args.model_name_or_path:
        model = _load(model_args)
        remedy = f"the weights in {model_args.model_name_or_path} fix it; use their tokenizer and shorter rows"
    else:
        family = "megatron-bert" if model_args.encoder_ln_mode == "pre-ln" else "bert"
        config_class, model_class = FAMILIES[family]
        positions = model_args.max_position_embeddings or max(LEAST_POSITIONS, max_seq_length)
        vocab_size = model_args.vocab_size or -(-vocabulary_size(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        config = config_class(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            hidden_act=model_args.hidden_act,
            hidden_dropout_prob=model_args.hidden_dropout_prob,
            attention_probs_dropout_prob=model_args.attention_probs_dropout_prob,
            initializer_range=model_args.initializer_range,
            pad_token_id=tokenizer.pad_token_id,
            **model_args.shape,
        )
        try:
            model = model_class(config)
        except KeyError as error:
            raise UserError(f"--hidden_act {model_args.hidden_act} is unknown to transformers: try gelu") from error
        remedy = "give at least that many, or drop the flag"
    if model.config.vocab_size < (needed := vocabulary_size(tokenizer)):
        raise UserError(f"--vocab_size {model.config.vocab_size} is below the tokenizer's {needed}: {remedy}")
    if model.config.max_position_embeddings < max_seq_length:
        raise UserError(
            f"--max_seq_length {max_seq_length} is above the model's {model.config.max_position_embeddings} "
            f"positions: {remedy}"
        )
    make_fast(model)
    use_attention(model, "sdpa")
    model.packs_documents = data_args.packing == "documents"
    return model


def _load(model_args):
    where = f"--model_name_or_path {model_args.model_name_or_path}"
    try:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        if config.model_type not in FAMILIES:
            raise UserError(f"{where} is a {config.model_type}: known are {', '.join(FAMILIES)}")
        model_class = FAMILIES[config.model_type][1]
        config.hidden_dropout_prob = model_args.hidden_dropout_prob
        config.attention_probs_dropout_prob = model_args.attention_probs_dropout_prob
        model, info = model_class.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        fault = first_line(error)
        raise UserError(f"{where} cannot be loaded ({fault}): give a folder that save_pretrained wrote") from error
    if info["missing_keys"]:
        raise UserError(f"{where} lacks {sorted(info['missing_keys'])[0]}: is it a masked-language model?")
    return model
