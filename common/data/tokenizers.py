"""Tokenizers: load one from wherever it lies, or train a WordPiece vocabulary on the data."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from common.data.word_cache import CheckedEncoder, WordCache, can_be_cached
from common.errors import UserError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NEEDED = ("cls", "sep", "pad", "mask")  # masked language modelling works with no less
# What these tokens are called in the tokenizer.json files in circulation, where nothing beside the file says it.
USUAL_NAMES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>", "<cls>"),
    "sep_token": ("[SEP]", "</s>", "<sep>"),
    "mask_token": ("[MASK]", "<mask>"),
}
MAX_ALPHABET = 1000  # characters; rarer ones become [UNK], as in BERT's own vocabularies
MIN_VOCAB_SIZE = 100


def load_tokenizer(name_or_path: str, cache_dir: str | None = None, trust_remote_code: bool = False):
    """Load a tokenizer with a fast (Rust) backend.

    Args:
        name_or_path: a name on the hub, a folder, a tokenizer.json, or a WordPiece vocab.txt (alone in a folder, too).
        cache_dir: where downloads are kept; None for Hugging Face's own cache.
        trust_remote_code: whether code that comes with the tokenizer may run.
    Returns:
        A PreTrainedTokenizerFast that has cls, sep, pad and mask tokens.
    Raises:
        UserError: it cannot be found or read, or lacks one of these tokens.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() and not (path / "tokenizer_config.json").exists():
        # A bare file in a folder; with a tokenizer_config.json beside it, transformers knows what to do.
        files = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
        path = files[0] if files else path
    if path.is_file() and path.suffix == ".txt":
        tokenizer = _from_vocab_file(path)
    elif path.is_file() and not (path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists()):
        tokenizer = _from_tokenizer_file(path)
    else:
        tokenizer = _from_pretrained(path.parent if path.is_file() else name_or_path, cache_dir, trust_remote_code)
    missing = [f"{name}_token" for name in NEEDED if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise UserError(f"--tokenizer_name {name_or_path}: has no {', '.join(missing)}; give a BERT-like tokenizer")
    return tokenizer


def _from_pretrained(name_or_path, cache_dir: str | None, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), cache_dir=cache_dir, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--tokenizer_name {name_or_path}: cannot be loaded ({reason}); check the name, or give a local folder, "
            "tokenizer.json or vocab.txt"
        ) from error
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise UserError(f"--tokenizer_name {name_or_path}: has no fast version; give one with a tokenizer.json")
    return tokenizer


def _from_tokenizer_file(path: Path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"--tokenizer_name {path}: not a tokenizer.json ({error}); check the file") from error
    names = {
        role: [name for name in usual if backend.token_to_id(name) is not None] for role, usual in USUAL_NAMES.items()
    }
    specials = {role: found[0] for role, found in names.items() if found}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def _from_vocab_file(path: Path):
    try:
        tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--tokenizer_name {path}: not UTF-8 text; a vocab.txt has one token per line") from error
    tokens = [token.rstrip("\r") for token in tokens]
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise UserError(f"--tokenizer_name {path}: {repeated[0]!r} stands on more than one line; correct the file")
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"--tokenizer_name {path}: has no {', '.join(missing)}; give a BERT vocabulary")
    uncased = not any(
        token != token.lower() for token in tokens if not (token.startswith("[") and token.endswith("]"))
    )
    return wordpiece_tokenizer(tokens, lowercase=uncased)


def wordpiece_tokenizer(tokens: list[str], lowercase: bool):
    """Make a stock BERT tokenizer of a vocabulary.

    Args:
        tokens: the vocabulary; a token's position is its id. Holds [PAD], [UNK], [CLS], [SEP] and [MASK].
        lowercase: whether text is put into lower case and stripped of its accents.
    Returns:
        A transformers BertTokenizer without a maximum length.
    """
    from transformers import BertTokenizer

    # The vocabulary as a dict: with vocab_file=, transformers 5 takes no notice of the file.
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, do_lower_case=lowercase)


def train_wordpiece(documents: Iterable[str], vocab_size: int):
    """Train an uncased WordPiece tokenizer; the same documents give the same one.

    Args:
        documents: texts; all are held in memory.
        vocab_size: upper limit of the number of tokens; little text yields fewer.
    Returns:
        A transformers BertTokenizer with [PAD], [UNK], [CLS], [SEP], [MASK] as ids 0 to 4.
    Raises:
        UserError: the vocabulary size is too small.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--tokenizer_train_vocab_size {vocab_size}: too small; give at least {MIN_VOCAB_SIZE}")
    documents = list(documents)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = _alphabet(documents, tokenizer.normalizer, min(MAX_ALPHABET, vocab_size // 4))
    # The trainer breaks ties by id and gives ids to "##a", "##b", … in the order of a hash table, which differs
    # from run to run. Handing them over as special tokens fixes their ids.
    inner = ["##" + character for character in alphabet if _can_continue(character, tokenizer.pre_tokenizer)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + inner,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    vocab = tokenizer.get_vocab()
    return wordpiece_tokenizer(sorted(vocab, key=vocab.get), lowercase=True)


def _alphabet(documents: list[str], normalizer, limit: int) -> list[str]:
    """The most frequent characters after normalising, sorted."""
    raw, counts = Counter(), Counter()
    for document in documents:
        raw.update(document)
    for character, count in raw.items():
        for normal in normalizer.normalize_str(character):
            counts[normal] += count
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(character for character in frequent[:limit] if not character.isspace())


def _can_continue(character: str, pre_tokenizer) -> bool:
    """Whether a character is ever inside a word; punctuation is a word of its own."""
    return len(pre_tokenizer.pre_tokenize_str("a" + character)) == 1


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
        say: called with one line if the fast way (common/data/word_cache.py) cannot be trusted.
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
    if not can_be_cached(facts):
        return encode
    cache = WordCache(facts["model"], facts["normalizer"]["lowercase"], encode, dtype)
    return CheckedEncoder(cache.encode, encode, say)
