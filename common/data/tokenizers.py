"""Tokenizers: load one from wherever it lies, or train one on the data."""

import hashlib
import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.bpe import bare_files, load_bare_files, train_byte_level_bpe
from common.data.byte_level_cache import ByteLevelCache, is_plain_byte_level
from common.data.unigram_lm import train_unigram
from common.data.word_cache import CheckedEncoder, WordCache, can_be_cached
from common.data.wordpiece import load_vocab_file, train_wordpiece
from common.errors import UserError, first_line
from common.loading import CONFIG_ERRORS

# What these tokens are called in the tokenizer.json files in circulation, where nothing beside the file says it.
USUAL_NAMES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>", "<cls>"),
    "sep_token": ("[SEP]", "</s>", "<sep>"),
    "mask_token": ("[MASK]", "<mask>"),
    "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
}


@dataclass(frozen=True)
class TokenizerKind:
    """What a training objective asks of a tokenizer.

    Args:
        name: of what is trained on the data.
        needed: special tokens that it works with no less than, without "_token".
        wanted: one phrase for people, what to give.
        train: function of documents and an upper limit of the vocabulary's size, that returns a tokenizer.
    """

    name: str
    needed: tuple[str, ...]
    wanted: str
    train: Callable


MASKED = TokenizerKind("WordPiece vocabulary", ("cls", "sep", "pad", "mask"), "a BERT-like tokenizer", train_wordpiece)
CAUSAL = TokenizerKind(
    "byte-level BPE vocabulary", ("eos",), "a tokenizer with an end-of-text token", train_byte_level_bpe
)
UNIGRAM = TokenizerKind("Unigram vocabulary", MASKED.needed, MASKED.wanted, train_unigram)


def load_tokenizer(
    name_or_path: str, cache_dir: str | None = None, trust_remote_code: bool = False, kind: TokenizerKind = MASKED
):
    """Load a tokenizer with a fast (Rust) backend.

    Args:
        name_or_path: a name on the hub, a folder, a tokenizer.json, or a WordPiece vocab.txt (alone in a folder, too);
            or a folder with the vocab.json and merges.txt of a byte-level BPE.
        cache_dir: where downloads are kept; None for Hugging Face's own cache.
        trust_remote_code: whether code that comes with the tokenizer may run.
        kind: what it is for.
    Returns:
        A PreTrainedTokenizerFast that has the special tokens its kind needs.
    Raises:
        UserError: it cannot be found or read, or lacks one of these tokens.
    """
    path = Path(name_or_path).expanduser()
    bare = path.is_dir() and not (path / "tokenizer_config.json").exists()  # with it, transformers knows what to do
    if bare:
        path = next((path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()), path)
    if path.is_file() and path.suffix == ".txt":
        tokenizer = load_vocab_file(path)
    elif path.is_file() and not (path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists()):
        tokenizer = _from_tokenizer_file(path, kind.needed)
    elif bare and (files := bare_files(path)):
        tokenizer = load_bare_files(*files)
    else:
        tokenizer = _from_pretrained(path.parent if path.is_file() else name_or_path, cache_dir, trust_remote_code)
    missing = [f"{name}_token" for name in kind.needed if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise UserError(f"--tokenizer_name {name_or_path}: has no {', '.join(missing)}; give {kind.wanted}")
    return tokenizer


def _from_pretrained(name_or_path, cache_dir: str | None, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), cache_dir=cache_dir, trust_remote_code=trust_remote_code
        )
    except (*CONFIG_ERRORS, ImportError) as error:
        reason = first_line(error)
        raise UserError(
            f"--tokenizer_name {name_or_path}: cannot be loaded ({reason}); check the name, or give a local folder, "
            "tokenizer.json or vocab.txt"
        ) from error
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise UserError(f"--tokenizer_name {name_or_path}: has no fast version; give one with a tokenizer.json")
    return tokenizer


def _from_tokenizer_file(path: Path, needed: tuple[str, ...]):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"--tokenizer_name {path}: not a tokenizer.json ({error}); check the file") from error
    names = {
        role: [name for name in usual if backend.token_to_id(name) is not None]
        for role, usual in USUAL_NAMES.items()
        if role.removesuffix("_token") in ("pad", "unk", *needed)
    }
    specials = {role: found[0] for role, found in names.items() if found}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a hash of all that decides a tokenizer's output, which truncation and padding do not."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    facts.pop("truncation")
    facts.pop("padding")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer) -> int:
    """Return the number of ids a model needs: the largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def corpus_encoder(backend_json: str, dtype, say: Callable[[str], None]) -> Callable[[list[str]], list[bytes]]:
    """Make the function that turns a corpus into token ids, without special tokens.

    Text is only text here: "[MASK]" in a document is not the mask token. Used by the tokenizing processes, so it needs
    nothing but numpy and the tokenizers library.

    Args:
        backend_json: the backend tokenizer's to_str().
        dtype: numpy integer type of the ids.
        say: called with one line if the fast way (word_cache.py, byte_level_cache.py) cannot be trusted.
    Returns:
        A function from a list of strings to a list of their ids, as bytes.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(backend_json)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    typecode = np.dtype(dtype).char

    def encode(documents: list[str]) -> list[bytes]:
        encodings = backend.encode_batch_fast(documents, add_special_tokens=False)
        return [array(typecode, encoding.ids).tobytes() for encoding in encodings]

    facts = json.loads(backend_json)
    if can_be_cached(facts):
        cache = WordCache(facts["model"], facts["normalizer"]["lowercase"], encode, dtype)
    elif is_plain_byte_level(facts):
        cache = ByteLevelCache(encode)
    else:
        return encode
    return CheckedEncoder(cache.encode, encode, say)
