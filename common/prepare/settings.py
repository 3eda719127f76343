"""What decides the bytes of prepared data: the tokenizer, and every flag that changes what is written."""

import json
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import filelock
import numpy as np

from common.data.blocks import BadRecords
from common.data.documents import expand_files
from common.data.prepare import TOKENIZER_SAMPLE_CHARACTERS
from common.data.token_files import token_dtype
from common.data.tokenizers import CAUSAL, MASKED, UNIGRAM, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from common.data.wikipedia import plain
from common.errors import UserError
from common.files import crc32, write_whole
from common.prepare.inputs import ANY
from common.prepare.shards import refuse_other_settings
from common.prepare.tokenize import shard_blocks

KINDS = {"wordpiece": MASKED, "bpe": CAUSAL, "unigram": UNIGRAM}
NO_DOCUMENTS = "the input holds no documents (nothing but white space?); check --input and --text_column"
VERSION = 3
READING = (
    "text_column",
    "document_separator",
    "components",
    "max_bad_records",
    "filter",
    "fix_unicode",
    "language",
    "append_eod",
    "near_duplicates",
)


@dataclass(frozen=True)
class Settings:
    """Of a prepared folder.

    tokenizer: transformers' fast one. tokenizer_name: where it is from. decontaminate: list of paths. shared: dict of
    what all shards are made with.
    """

    tokenizer: object = field(repr=False)
    tokenizer_name: str
    decontaminate: list
    shared: dict

    @property
    def vocab_size(self):
        """The largest id plus one."""
        return vocabulary_size(self.tokenizer)

    @property
    def how(self):
        """What the function of a batch is made from (common.prepare.encoding.make_shard_encoder)."""
        shared = self.shared
        return {
            "backend_json": self.tokenizer.backend_tokenizer.to_str(),
            "dtype": np.dtype(token_dtype(self.vocab_size)).str,
            "eod": self.tokenizer.eos_token_id if shared["append_eod"] else None,
            "part": shared["part"],
            "language": shared["language"],
            "near_duplicates": shared["near_duplicates"],
            "decontaminate": self.decontaminate,
            "preset": None if shared["filter"] == "none" else shared["filter"],
            "fix_unicode": shared["fix_unicode"],
            "components": shared["components"],
        }

    def of_shard(self, shard):
        """dict of JSON values that decide a shard's bytes."""
        return self.shared | {"input": [[one.identity(), *cut] for one, *cut in shard.parts]}

    def of_shard_file(self):
        """dict for the .json of a shard's token file."""
        return self.of_token_file() | {"unit": self.shared["part"]}

    def of_token_file(self):
        """dict for the .json of a token file."""
        roles = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
        found = {role: getattr(self.tokenizer, f"{role}_token_id") for role in roles}
        return {
            "unit": "sentence" if self.shared["part"] == "sentence" else "document",
            "tokenizer_name": self.tokenizer_name,
            "tokenizer_fingerprint": self.shared["tokenizer"],
            "vocab_size": self.vocab_size,
            "special_ids": {role: number for role, number in found.items() if number is not None},
        }


def make_settings(args, shards, folder, say):
    """The settings of a command line; where no tokenizer is named, one is trained, once, and kept in the folder.

    Args:
        args: PrepareArguments; shards: list of Shard; folder: Path, the output's, which exists; say: function that
            prints a line.
    Returns:
        Settings.
    Raises:
        UserError: a tokenizer that cannot be used, a folder that was prepared with other settings.
    """
    asked = {"version": VERSION, "num_shards": len(shards)} | {name: getattr(args, name) for name in READING}
    asked["part"] = "sentence" if args.split_sentences else "line" if args.deduplicate_lines else "document"
    contaminated = [str(path) for pattern in args.decontaminate or () for path in expand_files(pattern)]
    asked["decontaminate"] = [[Path(path).name, crc32(path)] for path in contaminated]
    named = args.tokenizer_name
    asked["trained"] = None if named else [args.tokenizer_type, args.tokenizer_train_vocab_size]
    recorded = folder / "settings.json"
    with filelock.FileLock(folder / ".settings.lock"):
        known = json.loads(recorded.read_bytes()) if recorded.exists() else None
        if known:
            refuse_other_settings(recorded, known, asked)
        if named:
            tokenizer = load_tokenizer(named, args.cache_dir, args.trust_remote_code, ANY)
        elif known:
            tokenizer = load_tokenizer(str(folder / "tokenizer"), kind=ANY)
        else:
            tokenizer = _train(KINDS[args.tokenizer_type], args, shards, say)
        shared = asked | {"tokenizer": tokenizer_fingerprint(tokenizer)}
        if known:
            refuse_other_settings(recorded, known, shared)
        if args.append_eod and tokenizer.eos_token_id is None:
            raise UserError("--append_eod: the tokenizer has no end-of-text token; name another with --tokenizer_name")
        if not known:
            tokenizer.save_pretrained(folder / "tokenizer")
            write_whole(recorded, json.dumps(shared, indent=2) + "\n")
    return Settings(tokenizer, named or "trained on the data", contaminated, shared)


def _train(kind, args, shards, say):
    sample, size, bad_records = [], 0, BadRecords(args.max_bad_records)
    for shard in shards:
        blocks = shard_blocks(shard, args, bad_records, say)
        documents = chain.from_iterable(block.documents(bad_records) for block, _ in blocks)
        for document, label in documents:
            if args.components is None or label in args.components:
                sample.append(plain(document))
                size += len(document)
            if size >= TOKENIZER_SAMPLE_CHARACTERS:
                break
        if size >= TOKENIZER_SAMPLE_CHARACTERS:
            break
    if not sample:
        raise UserError(NO_DOCUMENTS)
    tokenizer = kind.train(sample, args.tokenizer_train_vocab_size)
    say(f"tokenizer: trained a {kind.name} of {len(tokenizer):,} on {size / 1e6:.1f} MB of text")
    return tokenizer
