"""WordPiece, as BERT uses it: of a bare vocab.txt, or trained on the data."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_ALPHABET = 1000  # characters; rarer ones become [UNK], as in BERT's own vocabularies
MIN_VOCAB_SIZE = 100


def load_vocab_file(path: Path):
    """Load a vocab.txt, with one token a line; cased if any token has a capital letter.

    Returns:
        A transformers BertTokenizer.
    Raises:
        UserError: it is no BERT vocabulary.
    """
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
