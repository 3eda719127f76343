"""A masked-language model as the flags describe it, with random weights or from existing ones."""

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from common.data.tokenizers import vocabulary_size
from common.errors import UserError, first_line
from common.models.families import FAMILIES, first_position, positions
from common.models.layers import make_fast, use_attention

LEAST_POSITIONS = 512  # what users of BERT expect to be able to feed it, whatever it was trained on
VOCAB_MULTIPLE = 64  # embedding rows: matrix units like round numbers


def build_mlm_model(model_args, data_args, tokenizer):
    """Build the model of a run, with random weights or from existing ones.

    Args:
        model_args: common.arguments.ModelArguments.
        tokenizer: its size is the least vocabulary; its special ids go into the configuration.
        data_args: common.arguments.DataArguments, for the length of rows, how they are packed, and the objective.
    Returns:
        a stock transformers model whose forward is that of common/models/families.py, with sdpa attention until
        use_attention.
    Raises:
        UserError: a vocabulary or a sequence length that does not fit, weights that cannot be loaded.
    """
    max_seq_length, pairs = data_args.max_seq_length, data_args.sentence_objective != "none"
    if model_args.model_name_or_path:
        model = _load(model_args, pairs)
        remedy = f"the weights in {model_args.model_name_or_path} fix it; use their tokenizer and shorter rows"
    else:
        family = FAMILIES["megatron-bert" if model_args.encoder_ln_mode == "pre-ln" else model_args.model_type]
        vocab_size = model_args.vocab_size or -(-vocabulary_size(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        config = family.config(
            vocab_size=vocab_size,
            hidden_act=model_args.hidden_act,
            hidden_dropout_prob=model_args.hidden_dropout_prob,
            attention_probs_dropout_prob=model_args.attention_probs_dropout_prob,
            initializer_range=model_args.initializer_range,
            pad_token_id=tokenizer.pad_token_id,
            **family.published,
            **model_args.shape,
        )
        wanted = model_args.max_position_embeddings or max(LEAST_POSITIONS, max_seq_length)
        config.max_position_embeddings = wanted + first_position(config)
        try:
            model = _trained_class(family, config.model_type, pairs)(config)
        except KeyError as error:
            raise UserError(f"--hidden_act {model_args.hidden_act} is unknown to transformers: try gelu") from error
        remedy = "give at least that many, or drop the flag"
    if model.config.vocab_size < (needed := vocabulary_size(tokenizer)):
        raise UserError(f"--vocab_size {model.config.vocab_size} is below the tokenizer's {needed}: {remedy}")
    if (longest := positions(model.config)) < max_seq_length:
        raise UserError(f"--max_seq_length {max_seq_length} is above the model's {longest} positions: {remedy}")
    if hasattr(model, "sop_classifier"):
        model.sop_classifier.dropout.p = model_args.hidden_dropout_prob  # the configuration's is for fine-tuning
    make_fast(model)
    use_attention(model, "sdpa")
    model.packs_documents = data_args.packing == "documents"
    return model


def _trained_class(family, name, pairs):
    if pairs and not family.pairs:
        known = ", ".join(name for name, family in FAMILIES.items() if family.pairs)
        raise UserError(f"--sentence_objective: a {name} has no head for pairs of sentences: choose {known}")
    return family.pairs if pairs else family.model


def _load(model_args, pairs):
    where = f"--model_name_or_path {model_args.model_name_or_path}"
    try:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        if config.model_type not in FAMILIES:
            raise UserError(f"{where} is a {config.model_type}: known are {', '.join(FAMILIES)}")
        model_class = _trained_class(FAMILIES[config.model_type], config.model_type, pairs)
        config.hidden_dropout_prob = model_args.hidden_dropout_prob
        config.attention_probs_dropout_prob = model_args.attention_probs_dropout_prob
        model, info = model_class.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        fault = first_line(error)
        raise UserError(f"{where} cannot be loaded ({fault}): give a folder that save_pretrained wrote") from error
    if info["missing_keys"]:
        remedy = "leave out --sentence_objective" if pairs else "is it a masked-language model?"
        raise UserError(f"{where} lacks {sorted(info['missing_keys'])[0]}: {remedy}")
    return model
