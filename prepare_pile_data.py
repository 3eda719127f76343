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

from common.data.documents import expand_files
from common.errors import UserError, run_main
from common.prepare.arguments import chosen_shards, parse_command
from common.prepare.inspect import inspect
from common.prepare.merge import SPLITS, merge
from common.prepare.settings import make_settings
from common.prepare.shards import plan_shards
from common.prepare.tokenize import write_shard


def main():
    command, words, args = parse_command()
    say = partial(print, flush=True)
    if command == "inspect":
        return inspect(words[0], args, say)
    if not args.input:
        raise UserError("no text: name files, folders or globs with --input")
    files = sorted({path for pattern in args.input for path in expand_files(pattern)})
    shards = plan_shards(files, args.num_shards)
    chosen = chosen_shards(words, args.shard_index, len(shards))
    folder = Path(args.output_dir).expanduser()
    if args.overwrite_output_dir and command != "merge":
        remove_prepared(folder)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    settings = make_settings(args, shards, folder, say)
    if command != "merge":
        workers = args.workers or len(os.sched_getaffinity(0))
        for number in chosen:
            write_shard(shards[number], folder / "shards", settings, args, workers, say)
    if command != "tokenize":
        merge(shards, folder, settings, args, say)
    return 0


def remove_prepared(folder):
    """Remove what this program wrote into a folder, and nothing else. Args: folder: Path."""
    for name in ("shards", "tokenizer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("settings.json", *(f"{split}.{kind}" for split in SPLITS for kind in ("json", "idx", "bin"))):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    run_main(main)
