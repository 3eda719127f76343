"""The flags of run_glue.py, by Hugging Face's names. What can be judged from the flags alone is judged here."""

import sys
from dataclasses import dataclass, field

from transformers.hf_argparser import HfArg

from common.data.glue import DIAGNOSTIC, TASKS, find_task
from common.errors import UserError
from common.flags import LaunchArguments, at_least, between, drop_replaced, one_of, parse, positive
from common.schedulers import KNOWN_CURVES, check_curve

# Of Hugging Face's example and of ExtremeBERT's run_glue.sh.
REPLACED_FLAGS = {
    "--fp16_full_eval": ("?", "validation computes as training does"),
    "--bf16_full_eval": ("?", "validation computes as training does"),
    "--logging_strategy": (1, "--logging_steps says how often"),
    "--disable_tqdm": ("?", "the bar is drawn on a terminal alone"),
    "--finetune_checkpoint_at_end": ("?", "the model is always saved at the end"),
    "--overwrite_cache": ("?", "encoded rows are not kept"),
    "--use_fast_tokenizer": ("?", "there is no other"),
    "--local_rank": (1, "accelerate launch --config_file accelerate_configs/ddp.yaml numbers the processes"),
}


@dataclass
class GlueModelArguments:
    """Which checkpoint is fine-tuned."""

    model_name_or_path: str | None = HfArg(
        default=None, help="A checkpoint of run_pretraining.py, or any encoder: folder or hub name."
    )
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer (default: the checkpoint's own).")
    random_weights: bool = HfArg(default=False, help="Take the checkpoint's shape, but not its weights.")
    ignore_mismatched_sizes: bool = HfArg(default=False, help="Begin anew what does not fit, as another task's head.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept (default: the hub's own cache).")
    trust_remote_code: bool = HfArg(default=False, help="Allow code from the hub to run.")


@dataclass
class GlueDataArguments:
    """Which task, and where its files are."""

    task_name: str | None = HfArg(
        default=None, help=f"One of {', '.join(TASKS)}; or ax, to predict the diagnostic set with a model of mnli."
    )
    data_dir: str | None = HfArg(
        default=None, help="Folder of GLUE's TSV files: the root, or the task's own (default: GLUE from the hub)."
    )
    dataset_name: str | None = HfArg(
        default=None, help="Dataset on the hub, or a folder of parquet files laid out as one, instead of files."
    )
    dataset_config_name: str | None = HfArg(
        default=None, help="Its configuration (default: the task's name; none without --task_name)."
    )
    train_file: str | None = HfArg(
        default=None, help="Training file instead; without --task_name a csv, tsv or jsonl with a column 'label'."
    )
    validation_file: str | None = HfArg(default=None, help="Validation file instead.")
    test_file: str | None = HfArg(default=None, help="Test file instead.")
    max_seq_length: int = HfArg(default=128, aliases=["--max_length"], help="Tokens of the longest row.")
    pad_to_max_length: bool = HfArg(default=False, help="Pad every row to that length instead of its neighbours'.")
    max_train_samples: int | None = HfArg(default=None, help="Use only the first N training rows.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only the first N validation rows.")
    max_predict_samples: int | None = HfArg(default=None, help="Use only the first N test rows.")

    @property
    def from_hub(self):
        """Whether the rows come from the hub, or a folder laid out as one: no file of GLUE's or one's own is named."""
        return not (self.data_dir or self.train_file or self.validation_file or self.test_file)


@dataclass
class GlueTrainingArguments(LaunchArguments):
    """Batch, optimizer, schedule, validation, checkpoints."""

    output_dir: str | None = HfArg(default=None, help="Where everything is written.")
    overwrite_output_dir: bool = HfArg(default=False, help="Replace the run that output_dir holds.")
    check_arguments: bool = HfArg(default=False, help="Check the arguments and read the data, train nothing.")
    do_train: bool = HfArg(default=False, help="Fine-tune.")
    do_eval: bool = HfArg(default=False, help="Score the validation split at the end.")
    do_predict: bool = HfArg(default=False, help="Write predictions for the test split.")
    seed: int = HfArg(default=42, help="Head, order and dropout all follow from it.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the training rows.")
    max_train_steps: int | None = HfArg(default=None, aliases=["--max_steps"], help="Optimizer steps, instead.")
    train_batch_size: int | None = HfArg(
        default=None, help="Rows in the global batch (default: what the devices take at once, times accumulation)."
    )
    per_device_train_batch_size: int = HfArg(default=8, help="Rows a device takes at once.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Micro-batches in an optimizer step.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Rows a device takes at once in validation.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute activations in the backward pass.")

    optimizer_type: str = HfArg(
        default="adamw",
        help="adamw, muon, adam, sgd, lamb, another of torch.optim or pytorch_optimizer, or a class as file.py:Class.",
    )
    optimizer_args: list[str] = field(
        default_factory=list, metadata={"help": "More arguments of the optimizer, as key=value."}
    )
    learning_rate: float = HfArg(default=5e-5, help="Peak learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Not on biases and norms.")
    adam_beta1: float = HfArg(default=0.9, help="Decay of the first moment.")
    adam_beta2: float = HfArg(default=0.999, help="Decay of the second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="Added to the denominator.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip the gradient; 0 = off.")
    lr_scheduler_type: str = HfArg(default="linear", help=f"Curve after the warm-up: {KNOWN_CURVES}.")
    warmup_ratio: float = HfArg(
        default=0.0, aliases=["--warmup_proportion"], help="Share of the steps for the linear warm-up."
    )
    warmup_steps: int | None = HfArg(default=None, aliases=["--num_warmup_steps"], help="Warm-up in steps, instead.")

    eval_strategy: str = HfArg(
        default="no", aliases=["--evaluation_strategy"], help="no, steps (--eval_steps) or epoch: validate on the way."
    )
    eval_steps: int | None = HfArg(default=None, help="Validate every N optimizer steps.")
    logging_steps: int = HfArg(default=10, help="Log every N optimizer steps.")
    checkpointing_steps: int | None = HfArg(default=None, aliases=["--save_steps"], help="Save every N steps.")
    save_strategy: str = HfArg(
        default="steps", help="steps (--checkpointing_steps, and at the end), epoch, or no checkpoint to resume from."
    )
    save_total_limit: int = HfArg(default=2, help="Checkpoints kept; the oldest goes first.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="latest, or a checkpoint folder (step_N).")


def parse_glue_arguments(argv=None):
    """Parse and check the command line of run_glue.py.

    Args:
        argv: list of words without the program's name; None = sys.argv[1:].
    Returns:
        (GlueModelArguments, GlueDataArguments, GlueTrainingArguments, notes): notes are lines to print.
    Raises:
        UserError: unknown flags, values out of range, contradictions; the message names the flags.
    """
    argv, notes = drop_replaced(sys.argv[1:] if argv is None else argv, REPLACED_FLAGS)
    model, data, args = parse([GlueModelArguments, GlueDataArguments, GlueTrainingArguments], argv)
    if not model.model_name_or_path:
        raise UserError("--model_name_or_path is missing: give a folder that run_pretraining.py wrote, or a hub name")
    if data.task_name:
        task = find_task(data.task_name)
        if task is DIAGNOSTIC and (args.do_train or args.do_eval):
            raise UserError("--task_name ax has no labels: give --do_predict alone, and a model fine-tuned on mnli")
    elif not (data.train_file or data.dataset_name):
        raise UserError(
            f"--task_name is missing: give one of {', '.join(TASKS)}, or --train_file for a task of your own"
        )
    if data.dataset_name and not data.from_hub:
        raise UserError("--dataset_name and files (--data_dir, --train_file, ...) contradict each other: give one")
    if data.dataset_config_name and not data.dataset_name:
        raise UserError("--dataset_config_name needs --dataset_name")
    if not args.output_dir:
        raise UserError("--output_dir is missing: name a folder for the results")
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UserError("nothing to do: give --do_train, --do_eval or --do_predict")
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        at_least(data, name, 1)
    at_least(data, "max_seq_length", 8)
    for name in (
        "max_train_steps",
        "train_batch_size",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "per_device_eval_batch_size",
        "eval_steps",
        "logging_steps",
        "checkpointing_steps",
        "save_total_limit",
    ):
        at_least(args, name, 1)
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        at_least(args, name, 0)
    for name in ("learning_rate", "adam_epsilon", "num_train_epochs"):
        positive(args, name)
    for name in ("adam_beta1", "adam_beta2"):
        between(args, name, 0, 1, upper_open=True)
    between(args, "warmup_ratio", 0, 1)
    between(args, "seed", 0, 2**32 - 1)
    one_of("save_strategy", args.save_strategy, ["no", "steps", "epoch"])
    one_of("eval_strategy", args.eval_strategy, ["no", "steps", "epoch"])
    if args.eval_strategy == "steps" and not args.eval_steps:
        raise UserError("--eval_strategy steps needs --eval_steps: how often?")
    check_curve(args.lr_scheduler_type, {})
    return model, data, args, notes
