"""The command line of prepare_pile_data.py."""

import sys
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from common import flags
from common.data.documents import check_separator
from common.errors import UserError
from common.prepare.cleaning import FILTERS

COMMANDS = ("download", "tokenize", "merge", "inspect")
KINDS = ("wordpiece", "bpe", "unigram")


@dataclass
class PrepareArguments:
    """Flags of download, tokenize and merge. Several raise UserError."""

    input: list[str] | None = HfArg(
        default=None,
        help="Files, folders, globs, http addresses, or pile: txt, json, jsonl, csv, tsv, parquet, Wikipedia's dumps, "
        "WikiExtractor's files, Megatron's .bin; also compressed or in archives.",
    )
    dataset_name: list[str] | None = HfArg(
        default=None, help="Datasets on the hub, or folders laid out as one; streamed."
    )
    dataset_config_name: list[str] | None = HfArg(
        default=None, help="Their configurations, one for each dataset (default, where it has one alone)."
    )
    dataset_split: str = HfArg(default="train", help="Their split.")
    weights: list[float] | None = HfArg(
        default=None,
        help="Of every --input (and the datasets behind them): the share of the training tokens it shall have. Text "
        "is repeated or left out for that.",
    )
    output_dir: str = HfArg(default="prepared", help="Gets shards/, tokenizer/ and train, validation, test.")
    num_shards: int | None = HfArg(default=None, help="Parts that are done one by one. Default: one for each file.")
    shard_index: int | None = HfArg(default=None, help="tokenize: this shard alone, from 0, as in a job array.")
    text_column: str = HfArg(default="text", help="JSON key or parquet column that holds the text.")
    document_separator: str = HfArg(
        default="line", help="What ends a document of txt: line, blank_line, file, or this."
    )
    components: list[str] | None = HfArg(
        default=None, help="Parts of the corpus to take, by the Pile's pile_set_name."
    )
    max_bad_records: int = HfArg(default=0, help="Unreadable records that each shard skips.")
    tokenizer_name: str | None = HfArg(
        default=None, help="Hub name, folder, tokenizer.json or vocab.txt. Default: train one."
    )
    tokenizer_type: str = HfArg(
        default="wordpiece", help="What is trained: wordpiece (BERT), bpe (OPT) or unigram (ALBERT)."
    )
    input_tokenizer_name: str | None = HfArg(
        default=None, help="The tokenizer that made Megatron's .bin. Default: --tokenizer_name."
    )
    tokenizer_train_vocab_size: int = HfArg(default=30528, help="Most tokens of a trained tokenizer.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    trust_remote_code: bool = HfArg(default=False, help="Let code that comes with a tokenizer run.")
    append_eod: bool = HfArg(
        default=False, help="End every document with the end-of-text token, as Megatron does for GPT."
    )
    filter: str = HfArg(default="none", help="Leave documents out by published rules: none, gopher or c4.")
    fix_unicode: bool = HfArg(default=False, help="Repair text that was decoded in a wrong encoding, by ftfy.")
    split_sentences: bool = HfArg(
        default=False, help="Keep sentences apart, as sentence-order and next-sentence objectives need."
    )
    language: str = HfArg(default="en", help="Of the text, for --split_sentences: en, de, fr, ...")
    validation_split_percentage: float = HfArg(default=1.0, help="Share of the documents for validation.")
    test_split_percentage: float = HfArg(default=1.0, help="Share of the documents for test.")
    deduplicate: bool = HfArg(default=True, help="Keep one of equal documents.")
    near_duplicates: bool = HfArg(
        default=False, help="Keep one of nearly equal documents too (MinHash with FineWeb's settings)."
    )
    deduplicate_lines: int = HfArg(
        default=0, help="Lines that occur more often are left out from then on; 0: none, for text without templates."
    )
    decontaminate: list[str] | None = HfArg(
        default=None, help="Leave out documents with 13 words in a row as in these files, such as GLUE's."
    )
    workers: int | None = HfArg(default=None, help="Tokenizing processes, up to 0.5 GB each. Default: the cores.")
    checksums: str | None = HfArg(default=None, help="SHA-256 of what is downloaded, a file as sha256sum writes it.")
    remove_downloads: bool = HfArg(default=False, help="Remove what a shard downloaded when it is finished.")
    overwrite_output_dir: bool = HfArg(default=False, help="Prepare again what was prepared with other settings.")

    def __post_init__(self):
        for name in ("num_shards", "workers", "tokenizer_train_vocab_size"):
            flags.at_least(self, name, 1)
        for name in ("shard_index", "max_bad_records", "deduplicate_lines"):
            flags.at_least(self, name, 0)
        flags.one_of("tokenizer_type", self.tokenizer_type, KINDS)
        flags.one_of("filter", self.filter, ["none", *FILTERS])
        check_separator(self.document_separator)
        for name in ("validation_split_percentage", "test_split_percentage"):
            flags.between(self, name, 0, 100)
        configs = len(self.dataset_config_name or [])
        if configs and configs != len(self.dataset_name or []):
            raise UserError(
                f"--dataset_config_name {' '.join(self.dataset_config_name)}: give one for each --dataset_name "
                f"({len(self.dataset_name or [])}), default where a dataset has one alone"
            )
        if self.split_sentences and self.append_eod:
            raise UserError(
                "--append_eod is for GPT, --split_sentences for BERT's sentence objectives: give one of them"
            )
        if self.split_sentences and self.deduplicate_lines:
            raise UserError(
                "--deduplicate_lines and --split_sentences: one cuts documents into lines: give one of them"
            )
        if self.weights is not None:
            sources = len(self.input or []) + len(self.dataset_name or [])
            if len(self.weights) != sources or min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf"):
                raise UserError(
                    f"--weights {' '.join(map(str, self.weights))}: give one for each --input and dataset "
                    f"({sources}), none below 0, not all 0"
                )
        if self.validation_split_percentage + self.test_split_percentage >= 100:
            raise UserError("--validation_split_percentage and --test_split_percentage leave nothing for training")


@dataclass
class InspectArguments:
    """Flags of inspect."""

    num_samples: int = HfArg(default=3, help="Documents to decode.")
    seed: int = HfArg(default=0, help="Chooses them.")
    tokenizer_name: str | None = HfArg(default=None, help="Default: the folder tokenizer beside the files.")

    def __post_init__(self):
        flags.at_least(self, "num_samples", 0)


def parse_command(argv=None):
    """Read the command line.

    Args:
        argv: words without the program's name; None: sys.argv[1:].
    Returns:
        (command, words, arguments): "tokenize", "merge", "inspect" or "all"; the words before the first flag; a
        PrepareArguments or InspectArguments.
    Raises:
        UserError: what does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "all"
    words = []
    while argv and not argv[0].startswith("-"):
        words.append(argv.pop(0))
    if command in ("merge", "all") and words:
        known = f"{', '.join(COMMANDS)}, or nothing for all of it"
        raise UserError(f"{words[0]!r} is no command: give {known}; text is named by --input")
    if command == "inspect":
        (arguments,) = flags.parse([InspectArguments], argv)
        if len(words) != 1:
            raise UserError("inspect takes one path: a folder that was prepared, or a token file without its ending")
        return command, words, arguments
    (arguments,) = flags.parse([PrepareArguments], argv)
    if words and arguments.shard_index is not None:
        raise UserError(f"shards {' '.join(words)} and --shard_index {arguments.shard_index}: give one of them")
    return command, words, arguments


def chosen_shards(words, shard_index, count):
    """The shards that a command line asks for.

    Args:
        words: two numbers, the first shard and the last; or one or several in any other number ("3", "3,5,8",
            "0 4 7"); none for all. shard_index: instead, or None. count: how many there are.
    Returns:
        list of their numbers, ascending.
    Raises:
        UserError: no number, or no such shard.
    """
    if shard_index is not None:
        words = [f"{shard_index},"]
    if not words:
        return list(range(count))
    try:
        numbers = [int(part) for word in words for part in word.split(",") if part]
    except ValueError:
        raise UserError(f"shards {' '.join(words)}: give the first and the last, or a list as 3,5,8") from None
    if len(words) == 2 and len(numbers) == 2:
        numbers = list(range(numbers[0], numbers[1] + 1))
    if not numbers or not all(0 <= number < count for number in numbers):
        raise UserError(f"shards {' '.join(words)}: there are {count}, from 0 to {count - 1}")
    return sorted(set(numbers))
