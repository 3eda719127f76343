"""Flags that run_pretraining.py and run_clm.py share: the text, and how a model is trained on it.

What can be judged from them alone is judged here, before anything is loaded.
"""

from dataclasses import dataclass, field

from transformers.hf_argparser import HfArg

from common.batch_ramp import BatchRamp
from common.curve_files import check_curve_flags
from common.errors import UserError
from common.flags import LaunchArguments, at_least, between, one_of, positive
from common.limits import WARM_UP_STEPS
from common.schedulers import KNOWN_CURVES

DEFAULT_HOURS = 5 / 60  # a first run without any limit: long enough to learn something, short enough to watch


@dataclass
class TextArguments:
    """Where the text comes from."""

    dataset_name: str | None = HfArg(default=None, help="Dataset on the hub, or a local dataset folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration.")
    streaming: bool = HfArg(default=False, help="Read the hub dataset as a stream.")
    train_file: str | None = HfArg(
        default=None,
        aliases=["--train_path"],
        help="Text: txt, json, jsonl (each also .gz .bz2 .xz .zst), parquet; a file, a folder or a glob.",
    )
    validation_file: str | None = HfArg(default=None, help="Held-out text (else part of the training documents).")
    dataset_path: str | None = HfArg(default=None, help="Prepared token files: a folder, or a prefix of .bin/.idx.")
    text_column: str = HfArg(default="text", help="Column of the text in json, parquet and hub data.")
    document_separator: str = HfArg(
        default="line", help="What ends a document in txt files: line, blank_line, file, or a literal string."
    )
    max_bad_records: int = HfArg(default=0, help="Unreadable records to skip before giving up.")
    validation_split_percentage: float = HfArg(default=5.0, help="Documents held out for validation, in percent.")
    max_train_documents: int | None = HfArg(default=None, help="Use only the first N documents.")
    max_eval_samples: int = HfArg(default=1024, help="Rows of held-out text in each validation.")
    tokenizer_name: str | None = HfArg(
        default=None,
        aliases=["--vocab_path"],
        help="Hub name, folder, tokenizer.json or vocab.txt; else the weights' own, or one is trained.",
    )
    tokenizer_train_vocab_size: int = HfArg(default=8192, help="Vocabulary of a tokenizer trained on the data.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code from the hub to run.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Tokenising processes (default: all cores).")
    cache_dir: str | None = HfArg(
        default=None,
        help="Prepared data, trained tokenizers and downloads are kept here (runs/cache; downloads in the hub's own).",
    )
    overwrite_cache: bool = HfArg(default=False, help="Prepare the data again.")


@dataclass
class TrainingArguments(LaunchArguments):
    """Budget, batch, optimizer, schedule, validation, checkpoints, reports."""

    output_dir: str | None = HfArg(
        default=None, aliases=["--checkpoint_dir"], help="Where the run is written (default: runs/<time>)."
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Replace the run that output_dir holds.")
    check_arguments: bool = HfArg(default=False, help="Check the arguments, prepare the data, train nothing.")
    seed: int = HfArg(default=42, help="Weights, order, masks and dropout all follow from it.")

    # ---- budget: whichever limit is reached first ends the run
    total_training_time: float | None = HfArg(
        default=None,
        help="Wall-clock budget in hours; a time schedule reaches its end at this time. 5 minutes if no limit is set.",
    )
    early_exit_time_marker: float | None = HfArg(
        default=None, help="Stop after this many hours without shortening the schedule."
    )
    max_train_steps: int | None = HfArg(
        default=None, aliases=["--max_steps", "--num_minibatches"], help="Optimizer steps."
    )
    throughput_steps: int | None = HfArg(
        default=None,
        help="Measure the speed over N optimizer steps after a warm-up, print it and leave it in all_results.json: "
        "nothing is validated or saved.",
    )
    num_train_epochs: float | None = HfArg(default=None, aliases=["--num_epochs"], help="Passes over the rows.")
    finetune_time_markers: str | None = HfArg(
        default=None, help="Save a loadable checkpoint at these fractions of the budget, as in 0.25,0.5."
    )

    # ---- batch
    train_batch_size: int | None = HfArg(
        default=None, help="Rows in the global batch of one optimizer step (8 on a CPU, 256 on a GPU)."
    )
    rampup_batch_size: list[int] = field(
        default_factory=list,
        metadata={
            "help": "START INCREMENT ROWS, as Megatron's: begin with a global batch of START rows and add INCREMENT "
            "at equal distances, up to --train_batch_size when ROWS rows are consumed."
        },
    )
    per_device_train_batch_size: int = HfArg(
        default=32, aliases=["--train_micro_batch_size_per_gpu"], help="Rows a device takes at once."
    )
    per_device_eval_batch_size: int = HfArg(
        default=64, aliases=["--validation_micro_batch"], help="Rows a device takes at once in validation."
    )
    auto_find_batch_size: bool = HfArg(
        default=False, help="Halve the rows per device until they fit; the global batch stays."
    )
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute activations in the backward pass.")
    torch_compile: bool | None = HfArg(
        default=None, help="Compile the model (default: on a GPU; on a CPU it takes minutes and a C++ compiler)."
    )
    use_liger_kernel: bool | None = HfArg(
        default=None, help="Compute the loss by Liger's kernel (default: on CUDA, where it is installed and right)."
    )
    memory_settings: bool = HfArg(
        default=True,
        help="Restart once with settings for large blocks of memory and for waiting threads (Linux).",
    )

    # ---- optimizer
    optimizer_type: str = HfArg(
        default="muon",
        help="muon (the layers' matrices by Muon, the rest by AdamW), adamw, adam, sgd, lamb, sophia, another of "
        "torch.optim or pytorch_optimizer (lion, soap, shampoo, schedulefree, ...), or a class as file.py:Class or "
        "module:Class.",
    )
    optimizer_args: list[str] = field(
        default_factory=list, metadata={"help": "More arguments of the optimizer, as key=value."}
    )
    learning_rate: float = HfArg(default=2e-3, aliases=["--lr"], help="Peak learning rate.")
    weight_decay: float = HfArg(default=0.01, help="Not on biases and norms.")
    adam_beta1: float = HfArg(
        default=0.9,
        help="Decay of the first moment (not for sophia and classes of pytorch_optimizer, which keep their own).",
    )
    adam_beta2: float = HfArg(default=0.98, help="Decay of the second moment (the same).")
    adam_epsilon: float = HfArg(default=1e-6, aliases=["--adam_eps"], help="Added to the denominator (the same).")
    max_grad_norm: float = HfArg(default=1.0, aliases=["--gradient_clipping"], help="Clip the gradient; 0 = off.")

    # ---- schedule
    lr_schedule: str | None = HfArg(
        default=None,
        help="time or step: what the learning rate follows (time where there is a time budget); "
        "constant_step = step with --num_warmup_steps.",
    )
    lr_scheduler_type: str = HfArg(
        default="linear",
        aliases=["--curve"],
        help=f"Curve after the warm-up: {KNOWN_CURVES}; or customized, with --curve_conf_file.",
    )
    warmup_proportion: float = HfArg(default=0.06, help="Share of the budget for the linear warm-up.")
    num_warmup_steps: int | None = HfArg(default=None, help="Warm-up in optimizer steps, instead of a proportion.")
    min_lr_ratio: float = HfArg(default=0.0, help="Lowest learning rate as a share of the peak.")
    lr_power: float | None = HfArg(default=None, help="Power of the polynomial curve (1).")
    decay_proportion: float | None = HfArg(default=None, help="Share of the wsd curve that decays (0.2).")
    exponential_end_ratio: float | None = HfArg(default=None, help="Where the exponential curve ends (0.01).")
    decay_rate: float | None = HfArg(
        default=None, help="ExtremeBERT's exp curve: what the rate is multiplied by in every --decay_step (0.99)."
    )
    decay_step: float | None = HfArg(default=None, help="Steps for that, or hours of a time schedule (1000).")
    curve_conf_file: str | None = HfArg(
        default=None,
        help="ExtremeBERT's file of a curve, with --curve customized; iterations are steps after the warm-up.",
    )
    esd_shrink: float | None = HfArg(default=None, help="Shrink of the elastic step decay (the root of 2).")
    esd_cr_k: int | None = HfArg(default=None, help="Halvings before the elastic step decay begins to decay (6).")

    # ---- validation
    eval_steps: int | None = HfArg(default=None, help="Validate every N optimizer steps.")
    do_validation: bool = HfArg(
        default=False, help="Validate by ExtremeBERT's schedule in shards (the end of a run is always validated)."
    )
    shards_per_epoch: int = HfArg(default=256, help="Shards (ExtremeBERT's epochs) in one pass over the rows.")
    validation_epochs: int = HfArg(default=10, help="Validate every N shards.")
    validation_epochs_begin: int = HfArg(default=1, help="The same, in the first part of the budget.")
    validation_epochs_end: int = HfArg(default=1, help="The same, in the last part of the budget.")
    validation_begin_proportion: float = HfArg(default=0.1, help="Size of the first part, as a share of the budget.")
    validation_end_proportion: float = HfArg(default=0.1, help="Size of the last part, as a share of the budget.")
    use_early_stopping: bool = HfArg(default=False, help="Stop a run that is not learning.")
    early_stop_time: float = HfArg(default=720.0, help="Minutes after which --early_stop_eval_loss must be reached.")
    early_stop_eval_loss: float = HfArg(default=2.1, help="Validation loss to be below by then.")

    # ---- checkpoints
    resume_from_checkpoint: str | None = HfArg(
        default=None, aliases=["--load_training_checkpoint"], help="latest, or a checkpoint folder (step_N)."
    )
    checkpointing_steps: int | None = HfArg(default=None, help="Save every N optimizer steps.")
    checkpointing_minutes: float = HfArg(default=15.0, help="Save every N minutes; 0 = off.")
    num_epochs_between_checkpoints: int = HfArg(default=-1, help="Save every N shards; -1 = off.")
    save_total_limit: int = HfArg(default=2, help="Checkpoints kept; the oldest goes first.")
    replay_clock: str | None = HfArg(
        default=None, help="Take the clock's readings from this file (a run's clock.f64): repeats a timed run exactly."
    )

    # ---- reports
    logging_steps: int = HfArg(default=10, aliases=["--print_steps"], help="Log every N optimizer steps.")
    report_to: str = HfArg(default="none", help="none, tensorboard or wandb; nothing is sent anywhere unasked.")
    project_name: str = HfArg(default="frugal", help="Project in the tracker.")
    job_name: str | None = HfArg(default=None, help="Run in the tracker (default: the name of output_dir).")

    @property
    def curve_options(self):
        """Options of the learning-rate curve that were given, by name."""
        names = ("lr_power", "decay_proportion", "exponential_end_ratio", "esd_shrink", "esd_cr_k")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def batch_ramp(self):
        """The global batch of every step."""
        return BatchRamp(self.train_batch_size, self.rampup_batch_size)

    @property
    def time_markers(self):
        """--finetune_time_markers as a list of fractions in (0, 1)."""
        return [float(part) for part in (self.finetune_time_markers or "").split(",") if part]


def check_text(data):
    """Judge the flags of TextArguments; raises UserError."""
    for name in ("dataset_name", "train_file", "validation_file", "dataset_path", "tokenizer_name"):
        if getattr(data, name) == "":
            raise UserError(f"--{name} is empty: give a value, or leave the flag out")
    sources = [name for name in ("dataset_name", "train_file", "dataset_path") if getattr(data, name)]
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} contradicts --{sources[1]}: name one source of text")
    if data.validation_file and not data.train_file:
        raise UserError("--validation_file needs --train_file: name the training text too")
    if data.streaming and not data.dataset_name:
        raise UserError("--streaming needs --dataset_name: local files are always read as a stream")
    if data.dataset_config_name and not data.dataset_name:
        raise UserError("--dataset_config_name needs --dataset_name: name the dataset too")
    between(data, "validation_split_percentage", 0, 100, lower_open=True, upper_open=True)
    for name in ("max_eval_samples", "max_train_documents", "preprocessing_num_workers"):
        at_least(data, name, 1)
    at_least(data, "max_bad_records", 0)
    at_least(data, "tokenizer_train_vocab_size", 128)


def check_training(args, default_epochs=None):
    """Judge the flags of TrainingArguments, and settle what ends the run; raises UserError.

    Args:
        default_epochs: what ends a run without any limit; None = five minutes.
    """
    for name in ("total_training_time", "early_exit_time_marker", "num_train_epochs"):
        positive(args, name)
    between(args, "seed", 0, 2**32 - 1)
    at_least(args, "checkpointing_minutes", 0)
    if len(args.rampup_batch_size) not in (0, 3):
        given = " ".join(map(str, args.rampup_batch_size))
        raise UserError(f"--rampup_batch_size {given}: give three numbers, START INCREMENT ROWS")
    for name in ("max_train_steps", "train_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"):
        at_least(args, name, 1)
    for name in ("eval_steps", "checkpointing_steps", "save_total_limit", "logging_steps", "shards_per_epoch"):
        at_least(args, name, 1)
    for name in ("validation_epochs", "validation_epochs_begin", "validation_epochs_end"):
        at_least(args, name, 1)
    for name in ("warmup_proportion", "min_lr_ratio", "validation_begin_proportion", "validation_end_proportion"):
        between(args, name, 0, 1)
    for name in ("max_grad_norm", "weight_decay"):
        at_least(args, name, 0)
    for name in ("adam_beta1", "adam_beta2"):
        between(args, name, 0, 1, upper_open=True)
    for name in ("learning_rate", "adam_epsilon", "decay_step"):
        positive(args, name)
    one_of("report_to", args.report_to, ["none", "tensorboard", "wandb"])
    for name in ("lr_power", "esd_cr_k"):
        at_least(args, name, 0)
    for name in ("decay_proportion", "exponential_end_ratio", "decay_rate"):
        if getattr(args, name) is not None:
            between(args, name, 0, 1, lower_open=True)
    if args.esd_shrink is not None and not 1 < args.esd_shrink < float("inf"):
        raise UserError(f"--esd_shrink {args.esd_shrink} must be above 1")
    if args.use_early_stopping and not (args.eval_steps or args.do_validation):
        raise UserError("--use_early_stopping needs validations on the way: add --eval_steps or --do_validation")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise UserError("--overwrite_output_dir contradicts --resume_from_checkpoint: drop one of them")
    if args.resume_from_checkpoint == "latest" and not args.output_dir:
        raise UserError("--resume_from_checkpoint latest needs --output_dir: name the run to continue")
    _check_limits(args, default_epochs)
    check_curve_flags(args)
    BatchRamp(args.train_batch_size, args.rampup_batch_size)  # judges them
    try:
        in_range = all(0 < marker < 1 for marker in args.time_markers)
    except ValueError:
        in_range = False
    if not in_range:
        raise UserError(f"--finetune_time_markers {args.finetune_time_markers}: give fractions like 0.25,0.5")


def _check_limits(args, default_epochs):
    """Settle what ends the run and what the learning rate follows."""
    at_least(args, "throughput_steps", 1)
    if args.throughput_steps:
        for name in ("total_training_time", "early_exit_time_marker", "max_train_steps", "num_train_epochs"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} contradicts --throughput_steps, which says when to end: drop one of them")
        args.max_train_steps, args.checkpointing_minutes = WARM_UP_STEPS + args.throughput_steps, 0.0
    steps_limited = args.max_train_steps is not None or args.num_train_epochs is not None
    if args.total_training_time is None and args.early_exit_time_marker is None and not steps_limited:
        if default_epochs:
            args.num_train_epochs, steps_limited = default_epochs, True
        else:
            args.total_training_time = DEFAULT_HOURS
    if args.total_training_time is None and not steps_limited:
        args.total_training_time = args.early_exit_time_marker
    if args.lr_schedule is None:
        args.lr_schedule = "time" if args.total_training_time is not None else "step"
    one_of("lr_schedule", args.lr_schedule, ["time", "step", "constant_step"])
    if args.lr_schedule == "constant_step":
        if args.num_warmup_steps is None:
            raise UserError("--lr_schedule constant_step needs --num_warmup_steps")
        args.lr_schedule = "step"
    if args.lr_schedule == "time" and args.total_training_time is None:
        raise UserError("--lr_schedule time needs --total_training_time (hours), or use --lr_schedule step")
    if args.lr_schedule == "step" and not steps_limited:
        raise UserError("--lr_schedule step needs --max_train_steps or --num_train_epochs: where does it end?")
    if args.num_warmup_steps is not None:
        at_least(args, "num_warmup_steps", 0)
        if args.lr_schedule == "time":
            raise UserError("--num_warmup_steps contradicts --lr_schedule time: use --warmup_proportion")
    if args.finetune_time_markers and args.total_training_time is None:
        raise UserError("--finetune_time_markers are fractions of --total_training_time: give it too")
