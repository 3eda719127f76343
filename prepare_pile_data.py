"""Turn raw text into token files, once, so that training never tokenizes.

    python prepare_pile_data.py --input corpus.jsonl.zst --output_dir prepared      # all of it
    python prepare_pile_data.py tokenize 0 29 --input 'pile/*.zst' --output_dir pile_tokens
    python prepare_pile_data.py merge --input 'pile/*.zst' --output_dir pile_tokens
    python prepare_pile_data.py inspect pile_tokens
    python run_pretraining.py --dataset_path pile_tokens

What is finished is not done again; what was interrupted is continued.
"""

import os
import shutil
from functools import partial
from pathlib import Path

from common.data.workers import Workers
from common.errors import UserError, run_main
from common.prepare.arguments import chosen_shards, parse_command
from common.prepare.encoding import make_shard_encoder
from common.prepare.inputs import find_inputs
from common.prepare.inspect import inspect
from common.prepare.merge import SPLITS, merge
from common.prepare.needs import announce
from common.prepare.settings import make_settings
from common.prepare.shards import ShardFiles, plan_shards
from common.prepare.tokenize import tokenize

WRITTEN = (
    "settings.json",
    "dropped.json",
    *(f"{split}.{kind}" for split in SPLITS for kind in ("json", "idx", "bin")),
)


def main(argv=None):
    """Run a command. Args: argv: words behind the program's name; None: those of this process. Returns: exit code."""
    command, words, args = parse_command(argv)
    say = partial(print, flush=True)
    if command == "inspect":
        return inspect(words[0], args, say)
    folder = Path(args.output_dir).expanduser()
    shards = plan_shards(find_inputs(args, folder / "downloads"), args.num_shards)
    chosen = [shards[number] for number in chosen_shards(words, args.shard_index, len(shards))]
    workers = args.workers or len(os.sched_getaffinity(0))
    if args.overwrite_output_dir and command in ("tokenize", "all"):
        remove_prepared(folder)
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror}): give another") from error
    if command != "merge":
        announce(shards, chosen, folder, workers, command, args, say)
    if command == "download":
        for shard in chosen:
            for one, *_ in shard.parts:
                one.fetch(say)
        return 0
    with Workers(make_shard_encoder, workers, flag="--workers") as processes:
        if command != "merge" and not all(
            ShardFiles(folder / "shards", shard).described_in.exists() for shard in chosen
        ):
            processes.start()  # in the time that the tokenizer takes
        settings = make_settings(args, shards, folder, say)
        if command != "merge":
            tokenize(chosen, folder / "shards", settings, args, processes, say)
    if command != "tokenize":
        merge(shards, folder, settings, args, say)
    return 0


def remove_prepared(folder):
    """Remove what this program wrote into a folder, downloads apart, and nothing else. Args: folder: Path."""
    for name in ("shards", "tokenizer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    run_main(main)
