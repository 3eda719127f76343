"""Which YAML fits: memory per device under each, and the command for the first that does.

python -m common.plan model devices memory-per-device-GB [batch] [seq]     # what scripts/plan.sh starts
"""

import math
import re
import sys
from dataclasses import replace

from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, OPTConfig

from common.data.masking import targets_per_row
from common.errors import UserError, run_main
from common.memory import GB, Workload
from common.memory_plan import format_plan, planned
from common.models.families import FAMILIES
from common.models.mlm import LEAST_POSITIONS
from common.models.presets import MODEL_SIZES, OPT_ALIASES, OPT_SIZES, model_shape, opt_shape

BATCH, LENGTH = 16, 1024  # rows and tokens, where nothing is said: run_clm.sh's
VOCABULARY, MASKED = 8192, 0.4  # run_pretraining.py's, of the tokenizer that it trains and of masked positions


def main(words=None):
    """Print the plan. Args: words: as above; None = the command line's."""
    model, devices, memory, *rest = sys.argv[1:] if words is None else words
    batch = _whole("batch", rest[0]) if rest else BATCH
    devices, memory = _whole("devices", devices), _positive("memory-per-device", memory)
    workload, command = describe(model, batch, _whole("seq", rest[1]) if rest[1:] else None)
    workload = replace(workload, ranks=devices, precision="bf16")
    print(format_plan(planned(workload), model, memory))
    print(recommend(workload, memory, command))


def describe(model, batch, length):
    """What is to be planned.

    Args:
        model: an OPT size, a BERT preset, or a folder or hub name; batch: rows on a device; length: tokens in a row,
            or None for 1024, or as many as the model has positions.
    Returns:
        (Workload, words of the command that trains it).
    Raises:
        UserError: an unknown model, a length above its positions.
    """
    if OPT_ALIASES.get(model, model) in OPT_SIZES:
        config, named = OPTConfig(**opt_shape(model)), f"--model_size {OPT_ALIASES.get(model, model)}"
    elif model in MODEL_SIZES:
        shape = {"vocab_size": VOCABULARY, "max_position_embeddings": max(LEAST_POSITIONS, length or 0)}
        shape |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        config, named = BertConfig(**model_shape(model), **shape), f"--model_size {model}"
    else:
        config, named = _load(model), f"--model_name_or_path {model}"
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
    known = f"{', '.join(OPT_SIZES)} of OPT, {', '.join(MODEL_SIZES)} of BERT, a folder or a hub name"
    unknown = f"model '{name}' is unknown: give {known}"
    if re.fullmatch(r"[0-9.]+[bm]?", name):  # a size that there is not: the hub need not be asked
        raise UserError(unknown)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
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
