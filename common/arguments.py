"""Flags of run_pretraining.py: Hugging Face's names first, others as aliases.

Everything that can be judged from the flags alone is judged here, so that a bad command ends in one line before
anything is loaded. The dataclasses are read-only after parsing.
"""

import json
import sys
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.hf_argparser import HfArg

from common.errors import UserError
from common.flags import at_least, between, drop_replaced, flag_names, one_of, parse, positive
from common.length_stages import Stage, parse_stages, refuse_empty_stages
from common.loading import CONFIG_ERRORS
from common.models.electra import DISCRIMINATOR_WEIGHT, GENERATOR_WEIGHT
from common.models.presets import (
    DEVIATION,
    MEGATRON_SIZES,
    MODEL_SIZES,
    SIZES_BY_TYPE,
    deviation,
    electra_shape,
    model_shape,
)
from common.parallel import launched_engine
from common.training_arguments import TextArguments, TrainingArguments, check_text, check_training

CPU_BATCH, GPU_BATCH = 8, 256  # small ones learn more from minutes on a CPU (benchmarks/README.md); a GPU needs work

# What --parity takes as defaults instead of ours; flags that are given win over it.
PARITY = {
    # examples/pytorch/language-modeling/run_mlm_no_trainer.py of transformers, and BertConfig's own values
    "hf": {
        "optimizer_type": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear",
        "warmup_proportion": 0.0,
        "min_lr_ratio": 0.0,
        "train_batch_size": 8,
        "per_device_train_batch_size": 8,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "init_output_bias": "zeros",
        "mlm_probability": 0.15,
        "packing": "concat",
    }
}
# Where the YAML cuts matrices over the processes: the best without Muon (benchmarks/README.md).
OF_CUT_TENSORS = {"optimizer_type": "adamw", "learning_rate": 1e-3}
PARITY_EPOCHS = 3.0  # that example's, where no limit is given

# ExtremeBERT's launcher and loader owned these; each is answered with the YAML that does the job here.
REPLACED_FLAGS = {
    "--deepspeed": (0, "choose the strategy with accelerate launch --config_file accelerate_configs/<strategy>.yaml"),
    "--local_rank": (
        1,
        "accelerate launch --config_file accelerate_configs/ddp.yaml numbers the processes",
    ),
    "--data_loader_type": (1, "accelerate_configs/ddp.yaml (or any other) splits the rows over its processes"),
}

MODEL_TYPES = ("bert", "roberta", "albert", "deberta", "deberta-v2", "modernbert", "megatron-bert", "electra")
ALIASES = {"bert-mlm": "bert", "bert-mlm-roberta": "roberta"}  # ExtremeBERT's names

# What --config_name sets, by the names that a configuration and the flags share; what else it may say of the layers,
# with the values that are trained.
IN_CONFIG = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "vocab_size",
    "initializer_range",
)
FIXED_IN_CONFIG = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "is_decoder": False}

# What may still be chosen when the model is given by its weights.
FREE_WITH_WEIGHTS = (
    "model_name_or_path",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attn_implementation",
    "generator_name_or_path",
    "generator_weight",
    "discriminator_weight",
)
OF_ELECTRA = ("generator_size", "generator_name_or_path", "generator_weight", "discriminator_weight")


@dataclass
class ModelArguments:
    """Which model is trained: a preset, changed by free shape flags, or existing weights."""

    model_type: str = HfArg(
        default="bert",
        help="bert, roberta, albert (layers share their weights), deberta, deberta-v2 (as v3), modernbert, "
        "megatron-bert (= bert with --encoder_ln_mode pre-ln), or electra (a generator fills in the masked tokens, a "
        "discriminator finds those it replaced); ExtremeBERT's bert-mlm and bert-mlm-roberta mean bert and roberta.",
    )
    model_size: str = HfArg(
        default="mini",
        help=f"Preset: {', '.join(MODEL_SIZES)}; of some types also xsmall, xlarge, xxlarge; 17m, 32m and 68m of "
        f"modernbert; {', '.join(MEGATRON_SIZES)} of megatron-bert, with Megatron's initialisation.",
    )
    model_name_or_path: str | None = HfArg(
        default=None, help="Continue from these weights (hub name or folder) instead of random ones."
    )
    config_name: str | None = HfArg(
        default=None,
        aliases=["--bert_config_path"],
        help="Shape, dropout and initialisation of this configuration of a BERT (file, folder or hub name) instead of "
        "a preset's; flags that are given win over it.",
    )
    encoder_ln_mode: str | None = HfArg(
        default=None, help="post-ln (BERT, default) or pre-ln (trained and saved as transformers' megatron-bert)."
    )
    hidden_size: int | None = HfArg(default=None, help="Width, instead of the preset's.")
    num_hidden_layers: int | None = HfArg(default=None, help="Layers, instead of the preset's.")
    num_attention_heads: int | None = HfArg(default=None, help="Heads, instead of the preset's.")
    intermediate_size: int | None = HfArg(default=None, help="Width of the feed-forward layer (4 x hidden_size).")
    hidden_act: str = HfArg(default="gelu", help="Activation of the feed-forward layer.")
    hidden_dropout_prob: float = HfArg(default=0.0, help="Dropout in pretraining; 0 = off.")
    attention_probs_dropout_prob: float = HfArg(default=0.0, help="Dropout on attention in pretraining; 0 = off.")
    max_position_embeddings: int | None = HfArg(
        default=None, help="Longest sequence the model can read, in tokens (at least 512 unless given)."
    )
    vocab_size: int | None = HfArg(
        default=None, help="Rows of the embedding (the tokenizer's size rounded up to a multiple of 64)."
    )
    initializer_range: float | None = HfArg(
        default=None, help=f"Standard deviation of the initial weights (the preset's, mostly {DEVIATION})."
    )
    init_output_bias: str = HfArg(
        default="unigram",
        help="unigram: an untrained model answers with the training text's token frequencies; or zeros, as in BERT.",
    )
    attn_implementation: str = HfArg(
        default="auto",
        help="plain (two matmuls), sdpa, flex_attention (CUDA), or auto: the fastest one, measured at the start.",
    )

    generator_size: float | None = HfArg(
        default=None,
        aliases=["--generator_hidden_size"],
        help="electra: width of the generator as a share of the discriminator's (1/4, of base 1/3, as published).",
    )
    generator_name_or_path: str | None = HfArg(
        default=None,
        help="electra: the generator of --model_name_or_path, where it is not in its folder generator/.",
    )
    generator_weight: float = HfArg(
        default=GENERATOR_WEIGHT, aliases=["--gen_weight"], help="electra: weight of the generator's loss."
    )
    discriminator_weight: float = HfArg(
        default=DISCRIMINATOR_WEIGHT, aliases=["--disc_weight"], help="electra: weight of the discriminator's loss."
    )

    @property
    def shape(self):
        """Layers, width, heads and feed-forward width, by their names in a transformers configuration, and what else
        an electra has."""
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        changes = {name: getattr(self, name) for name in names}
        shape = model_shape(self.model_size, **changes, model_type=self.family)
        return shape | (electra_shape(self.model_size, shape, self.generator_size) if self.family == "electra" else {})

    @property
    def electra_flags(self):
        """The names of those that are for electra alone and have been given."""
        defaults = {field_.name: field_.default for field_ in fields(self)}
        return [name for name in OF_ELECTRA if getattr(self, name) != defaults[name]]

    @property
    def family(self):
        """The family that is trained: --encoder_ln_mode may have made another of bert."""
        return "megatron-bert" if self.encoder_ln_mode == "pre-ln" else self.model_type


@dataclass
class DataArguments(TextArguments):
    """The text, and how it becomes rows for masked-language modelling."""

    max_seq_length: int = HfArg(default=128, help="Tokens in a row.")
    max_seq_length_stages: str | None = HfArg(
        default=None,
        help="Rows that grow in the course of the run, as in 128:0.9,512:0.1: lengths with their shares of the steps, "
        "or of the time where the learning rate follows it. Batch sizes, epochs and validation are those of the last "
        "length; of shorter rows a device takes as many more, so that every step has the same tokens.",
    )
    packing: str = HfArg(
        default="documents",
        help="documents: documents share a row but do not see each other; concat: one stream cut into rows.",
    )
    mlm_probability: float = HfArg(
        default=0.4, help="Share of a row's positions that are predicted, in (0, 1); validation always masks 0.15."
    )
    final_mlm_probability: float | None = HfArg(
        default=None,
        help="The share at the end of the run; it changes linearly with the steps, from --mlm_probability on.",
    )
    masking: str = HfArg(
        default="token",
        help="What is chosen together: token, whole_word, or ngram: one to three words in proportion to 1/n, as in "
        "Megatron. Validation always chooses tokens.",
    )
    mask_replace_prob: float = HfArg(default=0.8, help="Share of the chosen tokens that become [MASK].")
    random_replace_prob: float = HfArg(
        default=0.1, help="Share of them that become a random token; what is left stays as it is."
    )
    sentence_objective: str = HfArg(
        default="none",
        help="Also judge pairs of texts, one pair in a row: sop (are two texts of a document in order?) or nsp (does "
        "the second follow the first?); needs token files of sentences in --dataset_path.",
    )

    @property
    def stages(self):
        """Stages of --max_seq_length_stages; one where all rows have one length."""
        if self.max_seq_length_stages:
            return parse_stages(self.max_seq_length_stages)
        return [Stage(self.max_seq_length, Fraction(1))]


@dataclass
class PretrainingArguments(TrainingArguments):
    """The same, with the recipe to take defaults from."""

    parity: str | None = HfArg(
        default=None,
        help="hf: the defaults of what is learned are those of the Hugging Face example run_mlm_no_trainer.py: batch, "
        "optimizer, schedule, dropout, masking, concatenated rows; 3 epochs if no limit is set.",
    )
    ema_decay: float | None = HfArg(
        default=None,
        help="Keep an exponential moving average of the weights with this decay, as 0.999, and save it in ema/.",
    )


GROUPS = (ModelArguments, DataArguments, PretrainingArguments)


def parse_pretraining_arguments(argv=None):
    """Parse and check the command line of run_pretraining.py.

    Args:
        argv: list of words without the program's name; None = sys.argv[1:].
    Returns:
        (ModelArguments, DataArguments, PretrainingArguments, notes): notes are lines to print, one per flag that a
        YAML replaces.
    Raises:
        UserError: unknown flags, values out of range, contradictions; the message names the flags.
    """
    argv, notes = drop_replaced(sys.argv[1:] if argv is None else argv, REPLACED_FLAGS)
    model, data, training = parse(GROUPS, argv)
    defaults = {}
    if training.parity is not None:
        one_of("parity", training.parity, list(PARITY))
        defaults = PARITY[training.parity]
        model, data, training = parse(GROUPS, argv, **defaults)
    if model.config_name:
        defaults = defaults | _of_config(model)
        model, data, training = parse(GROUPS, argv, **defaults)
    if training.optimizer_type == "muon" and launched_engine() not in ("plain", "pipeline"):
        model, data, training = parse(GROUPS, argv, **(defaults | OF_CUT_TENSORS))
        if training.optimizer_type != "muon":
            notes = [*notes, "note: this YAML cuts matrices, which Muon needs whole: AdamW takes its place"]
    _settle_length(data)
    _check_model(model, data, defaults)
    _check_data(data)
    if model.model_name_or_path and not data.tokenizer_name:  # its embedding knows no other ids
        data.tokenizer_name = model.model_name_or_path
    if training.train_batch_size is None:
        training.train_batch_size = GPU_BATCH if torch.cuda.is_available() else CPU_BATCH
    check_training(training, default_epochs=PARITY_EPOCHS if training.parity else None)
    _check_stages(data, training)
    if training.ema_decay is not None:
        between(training, "ema_decay", 0, 1, lower_open=True, upper_open=True)
    if data.final_mlm_probability is not None and training.lr_schedule == "time":
        raise UserError(
            "--final_mlm_probability follows the steps, which are made before their time is known: give "
            "--max_train_steps or --num_train_epochs with --lr_schedule step"
        )
    return model, data, training, notes


def frozen_flags():
    """Every flag of run_pretraining.py, sorted, for the test that freezes them."""
    return flag_names(GROUPS)


def _of_config(model):
    """What --config_name says of the model, by flag."""
    name, default = model.config_name, {field.name: field.default for field in fields(model)}
    for other in ("model_name_or_path", "model_size"):
        if getattr(model, other) != default[other]:
            raise UserError(f"--config_name contradicts --{other}: both choose the model's shape; drop one of them")
    try:
        if Path(name).is_file():
            found = json.loads(Path(name).read_text(encoding="utf-8"))
        else:
            found = AutoConfig.from_pretrained(name).to_dict()
    except CONFIG_ERRORS as error:
        raise UserError(f"--config_name {name} cannot be read: give a config.json, a folder or a hub name") from error
    if not isinstance(found, dict) or found.get("model_type", "bert") != "bert":
        raise UserError(f"--config_name {name} is no BERT's: choose --model_type and --model_size, and shape flags")
    if model.model_type not in ("bert", "bert-mlm"):
        raise UserError(
            f"--model_type {model.model_type} contradicts --config_name, which is a BERT's: drop one of them"
        )
    for key, value in FIXED_IN_CONFIG.items():
        if found.get(key, value) != value:
            raise UserError(f"--config_name {name}: {key} {found[key]} is not trained: set it to {value}")
    return {key: found[key] for key in IN_CONFIG if key in found}


def _check_model(model, data, defaults):
    model.model_type = ALIASES.get(model.model_type, model.model_type)
    one_of("model_type", model.model_type, MODEL_TYPES, note=f" (or {', '.join(ALIASES)})")
    if model.encoder_ln_mode is not None:
        one_of("encoder_ln_mode", model.encoder_ln_mode, ["post-ln", "pre-ln"])
    if model.encoder_ln_mode and model.model_type != "bert":
        if (model.encoder_ln_mode == "pre-ln") != (model.model_type == "megatron-bert"):
            mode = f"--encoder_ln_mode {model.encoder_ln_mode}"
            raise UserError(f"--model_type {model.model_type} contradicts {mode}: drop one of them")
    one_of("model_size", model.model_size, list(SIZES_BY_TYPE[model.family]), note=f" (of {model.family})")
    one_of("init_output_bias", model.init_output_bias, ["unigram", "zeros"])
    one_of("attn_implementation", model.attn_implementation, ["auto", "plain", "sdpa", "flex_attention"])
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for name in (*shape, "max_position_embeddings"):
        at_least(model, name, 1)
    if model.model_name_or_path:
        for field_ in fields(model):
            changed = getattr(model, field_.name) != defaults.get(field_.name, field_.default)
            if changed and field_.name not in FREE_WITH_WEIGHTS:
                raise UserError(f"--{field_.name} contradicts --model_name_or_path: the weights fix it; drop one")
    positive(model, "initializer_range")
    if model.initializer_range is None:
        model.initializer_range = deviation(model.model_size)
    if model.encoder_ln_mode is None:
        model.encoder_ln_mode = "pre-ln" if model.model_type == "megatron-bert" else "post-ln"
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        between(model, name, 0, 1, upper_open=True)
    if model.attn_implementation == "flex_attention" and model.attention_probs_dropout_prob:
        raise UserError(
            "--attn_implementation flex_attention has no dropout: give auto, plain or sdpa, or "
            "--attention_probs_dropout_prob 0"
        )
    if model.generator_size is not None:
        between(model, "generator_size", 0, 1, lower_open=True)
    for name in ("generator_weight", "discriminator_weight"):
        at_least(model, name, 0)
    if model.generator_name_or_path and not model.model_name_or_path:
        raise UserError("--generator_name_or_path needs --model_name_or_path, its discriminator: give both")
    if not model.model_name_or_path and model.family != "electra" and model.electra_flags:
        raise UserError(f"--{model.electra_flags[0]} is for --model_type electra: drop one of them")
    width, heads = (model.shape[name] for name in ("hidden_size", "num_attention_heads"))
    if width % heads:
        given = f"--num_attention_heads {heads}" if model.num_attention_heads else f"its {heads} heads of 64"
        raise UserError(f"--hidden_size {width} is not divisible by {given}: change it, or --num_attention_heads")
    if model.max_position_embeddings is not None and data.max_seq_length > model.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {data.max_seq_length} is above --max_position_embeddings "
            f"{model.max_position_embeddings}: shorten the rows or enlarge the model's positions"
        )


def _settle_length(data):
    """Let --max_seq_length be that of the last stage: the longest rows decide what does not change in a run."""
    if data.max_seq_length_stages == "":
        raise UserError("--max_seq_length_stages is empty: give a value, or leave the flag out")
    if not data.max_seq_length_stages:
        return
    longest = data.stages[-1].length
    if data.max_seq_length not in (DataArguments.max_seq_length, longest):
        raise UserError(
            f"--max_seq_length {data.max_seq_length} contradicts --max_seq_length_stages "
            f"{data.max_seq_length_stages}: drop it"
        )
    data.max_seq_length = longest


def _check_stages(data, training):
    if data.max_seq_length_stages and training.throughput_steps:
        raise UserError(
            "--throughput_steps contradicts --max_seq_length_stages: measure each length by itself (--max_seq_length)"
        )
    if training.lr_schedule == "step" and training.max_train_steps:
        refuse_empty_stages(data.stages, training.max_train_steps)


def _check_data(data):
    check_text(data)
    one_of("packing", data.packing, ["documents", "concat"])
    one_of("sentence_objective", data.sentence_objective, ["none", "nsp", "sop"])
    if data.sentence_objective != "none" and not data.dataset_path:
        raise UserError(
            f"--sentence_objective {data.sentence_objective} needs sentences: prepare the text with "
            "prepare_pile_data.py --split_sentences, and name its folder by --dataset_path"
        )
    if data.sentence_objective != "none" and data.packing == "concat":
        raise UserError(
            f"--sentence_objective {data.sentence_objective} contradicts --packing concat: rows hold pairs; drop one"
        )
    between(data, "mlm_probability", 0, 1, lower_open=True, upper_open=True)
    if data.final_mlm_probability is not None:
        between(data, "final_mlm_probability", 0, 1, lower_open=True, upper_open=True)
    one_of("masking", data.masking, ["token", "whole_word", "ngram"])
    for name in ("mask_replace_prob", "random_replace_prob"):
        between(data, name, 0, 1)
    if data.mask_replace_prob + data.random_replace_prob > 1:
        raise UserError(
            f"--mask_replace_prob {data.mask_replace_prob} and --random_replace_prob {data.random_replace_prob} are "
            "more than 1 together: lower one of them"
        )
    at_least(data, "max_seq_length", 8)
