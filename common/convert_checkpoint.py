"""A checkpoint in training, of any strategy, as a folder for from_pretrained; run by scripts/convert_checkpoint.sh.

Checkpoints hold whole tensors under the model's names (common/parallel/state.py), in one file or in one for each stage
of a pipeline; in fp32, whatever precision a strategy computes in.
"""

import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

from common.checkpoint import MANIFEST, damage, latest_checkpoint
from common.errors import UserError, run_main
from common.files import flush
from common.models.electra import generator_config, split_weights
from common.models.presets import GENERATOR

USAGE = "usage: bash scripts/convert_checkpoint.sh <checkpoint> <output-folder> [max-shard-size] [dtype]"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PARTS = "model-*-of-*.safetensors"  # of a pipeline's stages
SHARD_PATTERN = "model{suffix}.safetensors"  # as save_pretrained names them
SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja")


def main():
    if not 3 <= len(sys.argv) <= 5:
        raise UserError(f"{len(sys.argv) - 1} arguments instead of 2 to 4; {USAGE}")
    source, output, *how = sys.argv[1:]
    source, output = find_checkpoint(Path(source)), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already: name a new folder, or an empty one")
    files = convert(source, output, *how)
    print(f"{source} -> {output}: {', '.join(files)}")
    if not any(name.startswith(("tokenizer", "vocab")) for name in files):
        print(f"note: {source.parent} has no tokenizer; copy the model's into {output}")


def find_checkpoint(path):
    """The checkpoint that a user names.

    Args:
        path: Path of a step_N folder, or of a run for its newest whole checkpoint.
    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a step_N folder, or the folder of a run")
    if not (path / MANIFEST).exists():
        found = latest_checkpoint(path)
        if found is None:
            raise UserError(f"{path} has no whole checkpoint: give a step_N folder, or the folder of a run")
        return found
    if fault := damage(path):
        raise UserError(f"{path} cannot be used: {fault}; give another checkpoint")
    return path


def convert(source, output, shard_size=SHARD_SIZE, dtype="float32"):
    """Write the folder, whole or not at all.

    Args:
        source: Path of a checkpoint; output: Path that is absent or an empty folder; shard_size: as "5GB".
        dtype: of the numbers that are written, a name in DTYPES.
    Returns:
        list of the names of the files.
    Raises:
        UserError: shard_size is not a size, dtype is unknown, or the disk is full.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is unknown: give one of {', '.join(DTYPES)}")
    unfinished = output.absolute().with_name(output.name + ".writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        config, weights = AutoConfig.from_pretrained(source), {}
        config.dtype = DTYPES[dtype]
        config.save_pretrained(unfinished)
        for part in sorted(source.glob(PARTS)) or [source / WEIGHTS]:
            weights |= {name: tensor.to(config.dtype) for name, tensor in load_file(part).items()}
        weights, of_generator = split_weights(weights)
        models = {unfinished: weights}
        if of_generator:
            generator_config(config).save_pretrained(unfinished / GENERATOR)
            models[unfinished / GENERATOR] = of_generator
        for folder, tensors in models.items():
            try:
                save_torch_state_dict(tensors, folder, filename_pattern=SHARD_PATTERN, max_shard_size=shard_size)
            except ValueError as error:
                raise UserError(f"max-shard-size '{shard_size}': give a size as 500MB or 5GB") from error
            for pattern in TOKENIZER_FILES:
                for file in source.resolve().parent.glob(pattern):
                    shutil.copy(file, folder)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        names = [str(file.relative_to(unfinished)) for file in files]
        for file in files:
            flush(file)
        unfinished.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} cannot be written: {error}; nothing is left there") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    flush(output.absolute().parent)
    return names


if __name__ == "__main__":
    run_main(main)
