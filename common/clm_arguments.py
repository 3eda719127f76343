"""The flags of run_clm.py: those of Hugging Face's run_clm; text and training are those of run_pretraining.py."""

from dataclasses import dataclass, fields

from transformers.hf_argparser import HfArg

from common.errors import UserError
from common.flags import at_least, flag_names, one_of, parse
from common.models.presets import OPT_SIZES
from common.parallel import launched_data_ranks
from common.training_arguments import TextArguments, TrainingArguments, check_text, check_training

FINE_TUNING_RATE = 5e-5  # Hugging Face's
SCRATCH_RATE = 6e-4  # OPT-125m's (Zhang et al. 2022, arXiv:2205.01068, table 1)

# What run_clm.py takes where the flags say nothing: mostly Hugging Face's values.
DEFAULTS = {
    "optimizer_type": "adamw",
    "learning_rate": None,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "warmup_proportion": 0.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_eval_samples": 256,  # of OPT-125m on a CPU, more take minutes
}


@dataclass
class CausalModelArguments:
    """Which model is trained: existing weights, or random ones of a shape."""

    model_name_or_path: str | None = HfArg(default=None, help="Start from these weights (hub name or folder).")
    config_name: str | None = HfArg(
        default=None, help="Random weights of this configuration (hub name, folder or config.json)."
    )
    model_type: str = HfArg(default="opt", help="Random weights of this family: opt, gpt2, llama, ...")
    model_size: str | None = HfArg(
        default=None, help=f"Of opt, a published size: {', '.join(OPT_SIZES)}; 125m unless given."
    )
    config_overrides: str | None = HfArg(
        default=None, help="Settings of the configuration to change, as name=value,name=value."
    )


@dataclass
class CausalDataArguments(TextArguments):
    """The text, and how it becomes rows for causal language modelling."""

    synthetic_data: bool = HfArg(default=False, help="Train on random tokens: no text, no tokenizer.")
    block_size: int | None = HfArg(
        default=None, help="Tokens in a row (1024, or the model's positions where these are fewer)."
    )
    packing: str = HfArg(
        default="concat",
        help="concat: one stream cut into rows; documents: documents share a row but do not see each other.",
    )


@dataclass
class CausalTrainingArguments(TrainingArguments):
    """Budget, batch, optimizer, schedule, validation, checkpoints, reports."""

    gradient_accumulation_steps: int = HfArg(
        default=1, help="Micro-batches of a process in one optimizer step, where --train_batch_size is not given."
    )
    mem_cap: float = HfArg(
        default=0.0,
        help="Memory that a process may use, in GB (1e9 bytes): allocated on a GPU, resident on a CPU; 0 = no cap.",
    )
    dry_run: bool = HfArg(
        default=False, help="Print shapes, parameters and memory under each strategy, allocate nothing, train nothing."
    )


GROUPS = (CausalModelArguments, CausalDataArguments, CausalTrainingArguments)


def parse_clm_arguments(argv=None):
    """Parse and check the command line of run_clm.py.

    Args:
        argv: list of words without the program's name; None = sys.argv[1:].
    Returns:
        (CausalModelArguments, CausalDataArguments, CausalTrainingArguments).
    Raises:
        UserError: unknown flags, values out of range, contradictions; the message names the flags.
    """
    model, data, args = parse(GROUPS, argv, **DEFAULTS)
    _check_model(model)
    check_text(data)
    one_of("packing", data.packing, ["documents", "concat"])
    at_least(data, "block_size", 8)
    if data.synthetic_data:
        for name in ("dataset_name", "train_file", "dataset_path", "tokenizer_name"):
            if getattr(data, name):
                raise UserError(f"--{name} contradicts --synthetic_data: drop one of them")
    elif model.model_name_or_path and not data.tokenizer_name:  # its embedding knows no other ids
        data.tokenizer_name = model.model_name_or_path
    if args.learning_rate is None:
        args.learning_rate = FINE_TUNING_RATE if model.model_name_or_path else SCRATCH_RATE
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        at_least(args, name, 1)
    at_least(args, "mem_cap", 0)
    if args.train_batch_size is None:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.train_batch_size = rows * launched_data_ranks(args.pipeline_config)
    elif args.gradient_accumulation_steps > 1:
        raise UserError(
            "--gradient_accumulation_steps contradicts --train_batch_size, from which it follows: drop one"
        )
    check_training(args)
    return model, data, args


def frozen_flags():
    """Every flag of run_clm.py, sorted, for the test that freezes them."""
    return flag_names(GROUPS)


def _check_model(model):
    default = {field.name: field.default for field in fields(model)}
    named = [name for name in ("model_name_or_path", "config_name") if getattr(model, name)]
    if len(named) > 1:
        raise UserError("--model_name_or_path contradicts --config_name: drop one of them")
    for name in ("model_type", "model_size"):
        if named and getattr(model, name) != default[name]:
            raise UserError(f"--{name} contradicts --{named[0]}: drop one of them")
    if model.model_name_or_path and model.config_overrides:
        raise UserError("--config_overrides contradicts --model_name_or_path: the weights fix it; drop one")
    if named:
        return
    if model.model_type == "opt":
        model.model_size = {None: "125m", "6.7": "6.7b"}.get(model.model_size, model.model_size)
        one_of("model_size", model.model_size, list(OPT_SIZES))
    elif model.model_size:
        raise UserError(f"--model_size is of opt alone: shape a {model.model_type} with --config_overrides")
