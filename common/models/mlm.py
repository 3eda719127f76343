"""A masked-language model as the flags describe it, with random weights or from existing ones."""

import math

import torch
from transformers import AutoConfig

from common.data.tokenizers import vocabulary_size
from common.errors import UserError, first_line
from common.loading import WEIGHTS_ERRORS
from common.models.attention_choice import FLEX
from common.models.families import (
    FAMILIES,
    first_position,
    has_position_scores,
    has_unknown_parts,
    judges_tokens,
    positions,
)
from common.models.layers import make_fast, use_attention
from common.models.presets import MEGATRON_SIZES, deviation
from common.models.whole import build_whole, load_whole

LEAST_POSITIONS = 512  # what users of BERT expect to be able to feed it, whatever it was trained on
MEGATRON_NORMS = {"layer_norm_eps": 1e-5}
VOCAB_MULTIPLE = 64  # embedding rows: matrix units like round numbers


def build_mlm_model(model_args, data_args, tokenizer, load=load_whole, build=build_whole, begin=None):
    """Build the model of a run, with random weights or from existing ones.

    Args:
        model_args: common.arguments.ModelArguments.
        tokenizer: its size is the least vocabulary; its special ids go into the configuration.
        data_args: common.arguments.DataArguments, for the length of rows, how they are packed, and the objective.
        load, build: what common.parallel.loader and builder returned.
        begin: what is to be done to a model with random weights, in place; None: nothing.
    Returns:
        a stock transformers model whose forward is that of common/models/families.py, with sdpa attention until
        use_attention; its numbers may come with prepare().
    Raises:
        UserError: a vocabulary or a sequence length that does not fit, weights that cannot be loaded.
    """
    max_seq_length, pairs = data_args.max_seq_length, data_args.sentence_objective != "none"
    if model_args.model_name_or_path:
        model = _load(load, model_args, pairs)
        remedy = f"the weights in {model_args.model_name_or_path} fix it; use their tokenizer and shorter rows"
        _check_vocabulary(model.config, tokenizer, remedy)
    else:
        remedy = "give at least that many, or drop the flag"
        family = FAMILIES[model_args.family]
        of_megatron = model_args.family == "megatron-bert" and model_args.model_size in MEGATRON_SIZES
        vocab_size = model_args.vocab_size or -(-vocabulary_size(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        config = family.config(
            vocab_size=vocab_size,
            **family.translate(hidden_act=model_args.hidden_act, **_dropout(model_args)),
            initializer_range=model_args.initializer_range or deviation(model_args.model_size),
            pad_token_id=tokenizer.pad_token_id,
            **family.published,
            **(MEGATRON_NORMS if of_megatron else {}),
            **model_args.shape,
        )
        wanted = model_args.max_position_embeddings or max(LEAST_POSITIONS, max_seq_length)
        config.max_position_embeddings = wanted + first_position(config)
        _check_vocabulary(config, tokenizer, remedy)  # before `begin` counts tokens in it
        model_class = _trained_class(family, config.model_type, pairs)

        def make():
            model = model_class(config)
            if of_megatron:
                _shrink_last_projections(model)
            if begin:
                begin(model)
            return model

        try:
            model = build(make)
        except KeyError as error:
            raise UserError(f"--hidden_act {model_args.hidden_act} is unknown to transformers: try gelu") from error
    if (longest := positions(model.config)) < max_seq_length:
        raise UserError(f"--max_seq_length {max_seq_length} is above the model's {longest} positions: {remedy}")
    if hasattr(model, "sop_classifier"):
        model.sop_classifier.dropout.p = model_args.hidden_dropout_prob  # the configuration's is for fine-tuning
    if judges_tokens(model.config):
        model.loss_weights = model_args.generator_weight, model_args.discriminator_weight
    if model_args.attn_implementation == FLEX and has_position_scores(model.config):
        raise UserError(
            f"--attn_implementation {FLEX} has no place for a {model.config.model_type}'s position scores: "
            "give auto, plain or sdpa"
        )
    make_fast(model)
    use_attention(model, "sdpa")
    model.packs_documents = data_args.packing == "documents"
    return model


def _check_vocabulary(config, tokenizer, remedy):
    if config.vocab_size < (needed := vocabulary_size(tokenizer)):
        raise UserError(f"--vocab_size {config.vocab_size} is below the tokenizer's {needed}: {remedy}")


def _trained_class(family, name, pairs):
    if pairs and not family.pairs:
        known = ", ".join(name for name, family in FAMILIES.items() if family.pairs)
        raise UserError(f"--sentence_objective: a {name} has no head for pairs of sentences: choose {known}")
    return family.pairs if pairs else family.model


def _load(load, model_args, pairs):
    where = f"--model_name_or_path {model_args.model_name_or_path}"
    try:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        if config.model_type not in FAMILIES:
            raise UserError(f"{where} is a {config.model_type}: known are {', '.join(FAMILIES)}")
        if has_unknown_parts(config):
            raise UserError(f"{where} has talking heads or a grouped convolution, which are not trained: give another")
        family = FAMILIES[config.model_type]
        model_class = _trained_class(family, config.model_type, pairs)
        config.update(family.translate(**_dropout(model_args)))
        if family.renamed:
            config.legacy = True
        options = {}
        if judges_tokens(config):
            load = load_whole  # of a pair, which is compared
            options = {"generator_name_or_path": model_args.generator_name_or_path}
        elif changed := model_args.electra_flags:
            raise UserError(f"--{changed[0]} is for an electra, {where} is a {config.model_type}: drop one of them")
        model, info = load(
            model_class,
            model_args.model_name_or_path,
            config=config,
            dtype=torch.float32,
            key_mapping=family.renamed or None,
            **options,
        )
    except WEIGHTS_ERRORS as error:
        fault = first_line(error)
        raise UserError(f"{where} cannot be loaded ({fault}): give a folder that save_pretrained wrote") from error
    if info["missing_keys"]:
        remedy = "leave out --sentence_objective" if pairs else "is it a masked-language model?"
        remedy = "is it the discriminator?" if judges_tokens(config) else remedy
        raise UserError(f"{where} lacks {sorted(info['missing_keys'])[0]}: {remedy}")
    return model


def _dropout(model_args):
    return {name: getattr(model_args, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}


@torch.no_grad()
def _shrink_last_projections(model):
    """Megatron's initialisation: what ends a block is smaller by sqrt(2 L), as each of L layers adds two of them to
    its input. Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 5.1."""
    for layer in model.base_model.encoder.layer:
        for last in (layer.attention.output.dense, layer.output.dense):
            last.weight /= math.sqrt(2 * model.config.num_hidden_layers)
