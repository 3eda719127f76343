"""Remember what words become, in front of the Rust WordPiece: the same ids, many times as fast.

BERT's tokenizers treat what stands between two spaces by itself: normalizing does not look across a space, no word
holds one, and WordPiece sees one word at a time. So the ids of a text are those of its chunks one after another, and
most chunks have been seen before. A new one of printable ASCII is cut into words and word pieces here; every other one
(accents, Chinese, control characters, other kinds of spaces) goes to Rust, once.
"""

import re
from array import array
from collections.abc import Callable

import numpy as np

MAX_BYTES = 64 << 20  # of one process's cache: about 300,000 chunks
ENTRY_BYTES = 200  # of an entry, beside its characters and ids
CHECKED_CHARACTERS = 1 << 16  # of a stream are also tokenized by Rust, for comparison: 30 ms
WORDS = re.compile(r"[!-/:-@\[-`{-~]|[^!-/:-@\[-`{-~]+").findall  # in ASCII; punctuation is a word of its own

# Each is a case of its own in Rust's normalizer or pre-tokenizer, or in str.split, str.lower or str.isprintable.
SAMPLE = [
    "",
    " two  spaces\tand a tab\nnew line\r\nreturn ",
    "The CATS' naïve café, Ångström; e\u0301 and  \u0301lone accents, İstanbul ΣΟΦΟΣ Straße ﬁne",
    '(Don\'t) "quote" e-mail@example.com, U.S.A... $3.50 + 10^6 `code` a_b ~x |y| {z} #tag ##ing',
    "[MASK] [CLS]word[SEP] [PAD] [UNK] [mask] <mask> [unused1] [ MASK ]",
    "数学 is 数 漢字かな交じり 한국어 \U00020000\U0001f600👩‍👩‍👧 ไทย हिन्दी עברית عربي",
    "nul\x00in bell\x07 esc\x1b del\x7f vt\x0bx ff\x0cx fs\x1cx us\x1fx nel\x85x csi\x9bx",
    "nbsp\xa0x shy\xadx zwsp\u200bx zwj\u200dx ls\u2028x ps\u2029x ideo\u3000x bom\ufeffx bad\ufffdx ogham\u1680x",
    "x" * 99 + " " + "y" * 100 + " " + "z" * 101 + " " + "supercalifragilistic" * 30 + " " + "é" * 101,
    "—dash ‘quotes’ “more” …dots ¿qué? ×÷ ½ ² № ™ €5 °C µm",
]


class BoundedCache(dict):
    """From a chunk of text to its ids, as bytes.

    Args:
        encode_by_rust: from a list of texts to a list of their ids, as bytes.
        max_bytes: about the memory it may take; a full cache starts anew.
    """

    def __init__(self, encode_by_rust: Callable, max_bytes: int = MAX_BYTES):
        self.encode_by_rust = encode_by_rust
        self.max_bytes = self.free_bytes = max_bytes

    def keep(self, chunk: str, ids: bytes) -> bytes:
        """Remember ids, and give them back."""
        self.free_bytes -= ENTRY_BYTES + len(chunk) + len(ids)
        if self.free_bytes < 0:
            self.clear()
            self.free_bytes = self.max_bytes
        self[chunk] = ids
        return ids


class WordCache(BoundedCache):
    """From a chunk of text without spaces to its ids, as bytes.

    Args:
        model: the "model" of a tokenizer.json, a WordPiece.
        lowercase: whether the normalizer puts text into lower case.
        encode_by_rust, max_bytes: as BoundedCache; dtype: numpy integer type of the ids.
    """

    def __init__(self, model: dict, lowercase: bool, encode_by_rust: Callable, dtype, max_bytes: int = MAX_BYTES):
        super().__init__(encode_by_rust, max_bytes)
        prefix = model["continuing_subword_prefix"]
        self.beginnings = model["vocab"]
        self.continuations = {
            token.removeprefix(prefix): number for token, number in model["vocab"].items() if token.startswith(prefix)
        }
        self.max_characters = model["max_input_chars_per_word"]
        self.typecode = np.dtype(dtype).char
        self.unknown = array(self.typecode, [model["vocab"][model["unk_token"]]]).tobytes()
        self.lowercase = lowercase

    def encode(self, documents: list[str]) -> list[bytes]:
        """The ids of each document, as bytes."""
        return [b"".join(map(self.__getitem__, self._chunks(document))) for document in documents]

    def _chunks(self, text: str) -> list[str]:
        if self.lowercase and text.isascii():  # Rust's idea of lower case differs from Python's elsewhere
            text = text.lower()
        # str.split() without an argument would also split where Rust deletes a character and joins what is around it
        return text.replace("\n", " ").replace("\t", " ").replace("\r", " ").split(" ")

    def __missing__(self, chunk: str) -> bytes:
        if chunk.isascii() and chunk.isprintable():
            words = WORDS(chunk.lower() if self.lowercase else chunk)
            ids = self._word_pieces(words[0]) if len(words) == 1 else b"".join(map(self.__getitem__, words))
        else:
            (ids,) = self.encode_by_rust([chunk])
        return self.keep(chunk, ids)

    def _word_pieces(self, word: str) -> bytes:
        """Longest match first (Devlin et al. 2019; as in Rust, a word with a part that is in no piece is [UNK])."""
        if len(word) > self.max_characters:
            return self.unknown
        pieces, vocabulary, begin = array(self.typecode), self.beginnings, 0
        while begin < len(word):
            end = len(word)
            while (piece := vocabulary.get(word[begin:end])) is None:
                end -= 1
                if end == begin:
                    return self.unknown
            pieces.append(piece)
            vocabulary, begin = self.continuations, end
        return pieces.tobytes()


def can_be_cached(tokenizer: dict) -> bool:
    """Whether WordCache gives a tokenizer's ids.

    Args:
        tokenizer: the content of a tokenizer.json.
    """
    kinds = [(tokenizer[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    return (
        kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
        and tokenizer["model"]["unk_token"] in tokenizer["model"]["vocab"]
        and all(token["special"] for token in tokenizer["added_tokens"])  # others are looked for across spaces, too
    )


class CheckedEncoder:
    """Encodes by a cache for as long as it agrees with Rust, on SAMPLE and on the first documents' text; else by Rust.

    Args:
        encode: the cache's way from a list of documents to a list of their ids, as bytes.
        encode_by_rust: the same by Rust.
        say: called with one line if they differ.
    """

    def __init__(self, encode: Callable, encode_by_rust: Callable, say: Callable[[str], None]):
        self.encode, self.encode_by_rust, self.say = encode, encode_by_rust, say
        self.unchecked = CHECKED_CHARACTERS
        self._compare(SAMPLE)

    def __call__(self, documents: list[str]) -> list[bytes]:
        for document in documents:
            if self.unchecked <= 0:
                break
            self._compare([document[: self.unchecked]])  # of a huge one Rust takes a hundred bytes for each token
            self.unchecked -= len(document)
        return self.encode(documents)

    def _compare(self, documents: list[str]) -> None:
        if self.encode == self.encode_by_rust:
            return
        for document, ids in zip(documents, self.encode_by_rust(documents), strict=True):
            if self.encode([document]) != [ids]:
                self.say(f"note: the word cache is off, for it differs from the tokenizer on {document[:60]!r}")
                self.encode = self.encode_by_rust
                break
