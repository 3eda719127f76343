"""Which YAML fits: memory per device under each, and the command for the first that does; or the fastest pipelines.

python -m common.plan model devices [memory-per-device-GB] [batch] [seq] [flags]     # what scripts/plan.sh starts
"""

import math
import re
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import date

from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, MegatronBertConfig, OPTConfig
from transformers.hf_argparser import HfArg

from common.data.masking import targets_per_row
from common.errors import UserError, run_main
from common.flags import at_least, one_of, parse
from common.hardware_table import read_hardware, write_hardware
from common.loading import CONFIG_ERRORS
from common.memory import GB, Workload
from common.memory_plan import format_plan, planned
from common.models.families import FAMILIES
from common.models.mlm import LEAST_POSITIONS
from common.models.presets import MEGATRON_SIZES, MODEL_SIZES, OPT_ALIASES, OPT_SIZES, model_shape, opt_shape
from common.models.stages import check_family
from common.pipeline_plan import NEIGHBOURS, SCHEDULES, best_of_each, candidates, format_pipelines
from common.pipeline_runs import MEASURED_RUNS, format_command, format_measured, measure
from common.profile import devices_here, profile

BATCH, LENGTH = 16, 1024  # rows and tokens, where nothing is said: run_clm.sh's
VOCABULARY, MASKED = 8192, 0.4  # run_pretraining.py's, of the tokenizer that it trains and of masked positions
MEGATRON_VOCABULARY = 30528  # bert-large-uncased's, rounded up to a multiple of 64
MEASURED = "runs/cache/hardware.yaml"


@dataclass
class PlanArguments:
    """Flags behind the positional arguments: the plan of a pipeline."""

    train_batch_size: int | None = HfArg(
        default=None, help="Rows of an optimizer step over all devices: rank pipelines for them by speed."
    )
    hardware: str = HfArg(
        default=MEASURED, help="Hardware table (YAML) that speeds are predicted by; --profile writes it."
    )
    profile: bool = HfArg(default=False, help="Measure this machine with the model, and write the hardware table.")
    verify: bool = HfArg(
        default=False, help="Run the three fastest on this machine, and set measured beside predicted."
    )
    train_file: str | None = HfArg(default=None, help="Text for --verify (default: the embedded corpus).")
    schedule: str | None = HfArg(default=None, help=f"One schedule alone: {', '.join(SCHEDULES)} (default: all).")
    neighbours: str = HfArg(
        default="stages",
        help="Who share a machine: the stages of a pipeline, or the copies of a stage, as in PipeDream.",
    )


def main(words=None):
    """Print the plan. Args: words: as above; None = the command line's."""
    words = list(sys.argv[1:] if words is None else words)
    flags = next((n for n, word in enumerate(words) if re.match("-[^0-9.]", word)), len(words))
    positional, (args,) = words[:flags], parse([PlanArguments], words[flags:])
    at_least(args, "train_batch_size", 1)
    if args.schedule is not None:
        one_of("schedule", args.schedule, list(SCHEDULES))
    one_of("neighbours", args.neighbours, list(NEIGHBOURS))
    of_speed = args.train_batch_size or args.profile
    if args.verify and not args.train_batch_size:
        raise UserError("--verify needs --train_batch_size: rows of an optimizer step over all devices")
    if args.train_file and not args.verify:
        raise UserError("--train_file is for --verify, which alone trains: add it, or drop the flag")
    if not (2 if of_speed else 3) <= len(positional) <= 5:
        raise UserError(
            f"{len(positional)} arguments before the flags: give model, devices and memory-per-device, then batch and "
            "seq if you like"
        )
    model, devices, memory, batch, length = (*positional, *[None] * (5 - len(positional)))
    devices, most = _whole("devices", devices), _whole("batch", batch) if batch else None
    memory = _positive("memory-per-device", memory) if memory else None
    workload, command = describe(model, most or BATCH, _whole("seq", length) if length else None)
    workload = replace(workload, ranks=devices, precision="bf16")
    if not of_speed:
        print(format_plan(planned(workload), model, memory))
        print(recommend(workload, memory, command))
        return
    if args.profile:
        hardware = profile(workload)
        said = (
            f"measured {date.today()} with {model}, rows of {workload.seq_length} tokens, by scripts/plan.sh --profile"
        )
        write_hardware(hardware, args.hardware, said)
        print(f"{args.hardware}:\n" + open(args.hardware, encoding="utf-8").read(), end="")
    if args.train_batch_size:
        plan_pipelines(model, workload, command, memory, args, most)


def plan_pipelines(model, workload, command, memory, args, most_rows):
    """Print the fastest pipelines, with the command of the first; with --verify, run three.

    Args:
        model: its name; workload: with the number of devices as `ranks`; command: script and flags, as describe() gave
            them; memory: GB of a device, or None for the table's; args: PlanArguments; most_rows: of a micro-batch, or
            None.
    Raises:
        UserError: nothing fits, or cannot be predicted or run.
    """
    hardware, devices, batch = read_hardware(args.hardware), workload.ranks, args.train_batch_size
    check_family(workload.config)
    if args.verify and devices > devices_here():
        raise UserError(
            f"--verify: this machine has {devices_here()} device(s), the plan is for {devices}: plan for fewer"
        )
    memory = GB * (memory or hardware.memory)
    workload = replace(workload, ranks=1, precision=hardware.precision)
    schedules = [args.schedule] if args.schedule else SCHEDULES
    plans = candidates(workload, hardware, devices, batch, schedules, most_rows, args.neighbours)
    best = best_of_each(plans, memory)
    print(format_pipelines(best, model, batch, hardware, memory))
    print(format_command(best[0], command, hardware, args.neighbours), flush=True)
    if args.verify:
        text = ["--train_file", args.train_file] if args.train_file else []
        first = best[:MEASURED_RUNS]
        found = [measure(plan, number, command, hardware, text) for number, plan in enumerate(first, 1)]
        print(format_measured(first, found))


def describe(model, batch, length):
    """What is to be planned.

    Args:
        model: an OPT size, a preset of BERT or Megatron's BERT, or a folder or hub name; batch: rows on a device;
            length: tokens in a row, or None for 1024, or as many as the model has positions.
    Returns:
        (Workload, words of the command that trains it).
    Raises:
        UserError: an unknown model, a length above its positions.
    """
    if OPT_ALIASES.get(model, model) in OPT_SIZES:
        config, named = OPTConfig(**opt_shape(model)), f"--model_size {OPT_ALIASES.get(model, model)}"
    elif model in MODEL_SIZES or model in MEGATRON_SIZES:
        shape = {"vocab_size": VOCABULARY, "max_position_embeddings": max(LEAST_POSITIONS, length or 0)}
        shape |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        if model in MODEL_SIZES:
            config, named = BertConfig(**model_shape(model), **shape), f"--model_size {model}"
        else:
            shape |= model_shape(model, model_type="megatron-bert") | {"vocab_size": MEGATRON_VOCABULARY}
            named = f"--model_type megatron-bert --model_size {model} --tokenizer_name bert-large-uncased"
            config = MegatronBertConfig(**shape)
    else:
        config, named = _load(model), f"--model_name_or_path {shlex.quote(model)}"
    positions = getattr(config, "max_position_embeddings", None) or LENGTH
    length = length or min(LENGTH, positions)
    if length > positions:
        raise UserError(f"seq {length} is above the {positions} positions of {model}: give at most as many")
    masked = config.model_type in FAMILIES
    script, flag = ("run_pretraining.py", "--max_seq_length") if masked else ("run_clm.py", "--block_size")
    command = f"{script} {named} --optimizer_type adamw {flag} {length}"
    head = {"head": "masked", "targets": targets_per_row(MASKED, length), "packed": True} if masked else {}
    return Workload(config, batch, length, **head), command


def recommend(workload, memory, command):
    """The command for the first YAML that fits, or for what would fit with less on a device at once.

    Args:
        workload: what is asked for; memory: GB of a device; command: as describe() gave it.
    Returns:
        str of a line or two.
    """
    checkpointed = replace(workload, gradient_checkpointing=True)
    smaller = [replace(checkpointed, rows=workload.rows >> n) for n in range(1, workload.rows.bit_length())]
    said = "the first that fits"
    for less in (workload, checkpointed, *smaller):
        rows = planned(less)
        for row in rows:
            if row.parts.total <= memory * GB:
                return f"{said}:\n  {launch_line(row, command)}"
        said = "nothing fits as it is; the first that does with less"
    least = min(rows, key=lambda row: row.parts.total)
    return (
        f"nothing fits: the least, {least.parts.total / GB:.2f} GB, is {least.config.stem}'s with one row and "
        "gradient checkpointing; take more devices"
    )


def launch_line(row, command):
    """The command line of a Planned. Args: command: script and flags, as describe() gave them."""
    workload, launcher = row.workload, f"accelerate launch --config_file accelerate_configs/{row.config.name}"
    launcher += f" --num_processes {workload.processes}"
    if workload.strategy == "fsdp" and (workload.replicas > 1 or workload.slices > 1):
        launcher += f" --parallelism_config_dp_shard_size {workload.ranks // workload.replicas}"
    batch = f"--per_device_train_batch_size {workload.rows} --train_batch_size {workload.rows * workload.ranks}"
    return f"{launcher} {command} {batch}" + " --gradient_checkpointing" * workload.gradient_checkpointing


def _load(name):
    megatron = ", ".join(size for size in MEGATRON_SIZES if size not in OPT_SIZES)
    known = f"{', '.join(OPT_SIZES)} of OPT, {', '.join(MODEL_SIZES)} of BERT, {megatron} of Megatron's BERT"
    known += ", a folder or a hub name"
    unknown = f"model '{name}' is unknown: give {known}"
    if re.fullmatch(r"[0-9.]+[bm]?", name):  # a size that there is not: the hub need not be asked
        raise UserError(unknown)
    try:
        config = AutoConfig.from_pretrained(name)
    except CONFIG_ERRORS as error:
        raise UserError(unknown) from error
    if config.model_type not in FAMILIES and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model '{name}' is a {config.model_type}, which neither script trains: give {known}")
    return config


def _whole(name, word):
    if not re.fullmatch("[0-9]+", word) or int(word) < 1:
        raise UserError(f"{name} '{word}': give a whole number, 1 or more")
    return int(word)


def _positive(name, word):
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise UserError(f"{name} '{word}': give GB, more than 0")
    return number


if __name__ == "__main__":
    run_main(main)
