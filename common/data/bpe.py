"""Byte-level BPE, as GPT-2 and OPT use it: of a bare vocab.json with its merges.txt, or trained on the data."""

import json
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3 of OPT's vocabulary
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # any text can be written with a token for every byte
MAX_NOT_MERGED = 300  # tokens that no merge makes, beside single bytes: special and reserved ones, of which OPT has 9
# A text with every byte that UTF-8 uses: a token that is missing would be left out in silence.
LEAD_BYTES = [0x800, *range(0x1000, 0xD800, 0x1000), 0xE000, 0xF000, *range(0x10000, 0x110000, 0x40000), 0x10FFFF]
ROUND_TRIP = "Two  spaces,\n a naïve café, 数学 🙂" + "".join(map(chr, [*range(0x800), *LEAD_BYTES]))


def bare_files(folder: Path) -> tuple[Path, Path] | None:
    """Find GPT-2's two files in a folder, each with or without a prefix.

    Returns:
        The paths of vocab.json and merges.txt; None where neither is there.
    Raises:
        UserError: one is missing, or there are several.
    """
    found = [sorted(folder.glob(f"*{name}")) for name in ("vocab.json", "merges.txt")]
    if not any(found):
        return None
    if [len(paths) for paths in found] != [1, 1]:
        names = ", ".join(path.name for paths in found for path in paths)
        raise UserError(
            f"--tokenizer_name {folder}: holds {names}; give a folder with one vocab.json and its merges.txt"
        )
    return found[0][0], found[1][0]


def load_bare_files(vocab_file: Path, merges_file: Path):
    """Load a byte-level BPE of the two files that GPT-2's tokenizer consists of, and check it.

    Args:
        vocab_file: JSON object of ids by token.
        merges_file: one pair of tokens a line, the first merged first.
    Returns:
        A transformers GPT2Tokenizer.
    Raises:
        UserError: a file cannot be used, they do not belong together, or a text would not survive them.
    """
    from tokenizers.models import BPE

    try:
        vocab, merges = BPE.read_file(str(vocab_file), str(merges_file))
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(
            f"--tokenizer_name {vocab_file.parent}: {vocab_file.name} or {merges_file.name} cannot be read ({error}); "
            "give the whole files"
        ) from error
    for first, second in merges:  # the Rust library ends in a panic
        if not {first, second, first + second} <= vocab.keys():
            raise UserError(
                f"--tokenizer_name {merges_file}: merges {first!r} and {second!r}, of which "
                f"{vocab_file.name} does not know all; give the two files of one tokenizer"
            )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(
            f"--tokenizer_name {vocab_file}: its ids are not 0 to {len(vocab) - 1}, each once; give the whole file"
        )
    not_merged = {token for token in vocab if len(token) > 1}.difference(first + second for first, second in merges)
    if len(not_merged) > MAX_NOT_MERGED:
        raise UserError(
            f"--tokenizer_name {merges_file}: no merge makes {len(not_merged):,} of the {len(vocab):,} tokens; give "
            "the whole file"
        )
    tokenizer = byte_level_tokenizer(vocab, merges)
    if tokenizer is None:
        raise UserError(
            f"--tokenizer_name {vocab_file}: has neither GPT-2's <|endoftext|> nor OPT's <pad> as 1 and </s> as 2; "
            "give a tokenizer.json, which says what its special tokens are"
        )
    back = tokenizer.decode(tokenizer(ROUND_TRIP, add_special_tokens=False).input_ids)
    if back != ROUND_TRIP:
        lost = next((a for a, b in zip(ROUND_TRIP, back, strict=False) if a != b), ROUND_TRIP[-1])
        raise UserError(
            f"--tokenizer_name {vocab_file}: {lost!r} does not come back from its tokens; give the vocabulary of a "
            "byte-level BPE, which has a token for every byte"
        )
    return tokenizer


def byte_level_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]):
    """Make a stock GPT-2 tokenizer of a vocabulary.

    Args:
        vocab: ids by token; OPT's is known by <pad> being 1 and </s> being 2, GPT-2's by <|endoftext|>.
        merges: pairs of tokens, the first merged first.
    Returns:
        A transformers GPT2Tokenizer without a maximum length, or None for any other vocabulary. Where special tokens
        are added, OPT's puts </s> in front of a text, GPT-2's adds none.
    """
    from transformers import GPT2Tokenizer

    if vocab.get("<pad>") == 1 and vocab.get("</s>") == 2:
        # Source: facebook/opt-125m's tokenizer_config.json.
        end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
        return GPT2Tokenizer(vocab=vocab, merges=merges, **end, pad_token="<pad>", add_bos_token=True)
    if "<|endoftext|>" in vocab:
        return GPT2Tokenizer(vocab=vocab, merges=merges)
    return None


def train_byte_level_bpe(documents: Iterable[str], vocab_size: int):
    """Train a byte-level BPE whose special tokens are OPT's; the same documents give the same one.

    Args:
        documents: texts.
        vocab_size: upper limit of the number of tokens; little text yields fewer.
    Returns:
        A transformers GPT2Tokenizer with <s>, <pad>, </s>, <unk> as ids 0 to 3.
    Raises:
        UserError: the vocabulary size is too small.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--tokenizer_train_vocab_size {vocab_size}: too small; give at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once says nothing about other text
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return byte_level_tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
