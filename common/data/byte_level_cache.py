"""Remember what chunks of text become, in front of the Rust byte-level BPE: the same ids, many times as fast.

GPT-2's pre-tokenizer never puts a character and white space behind it into one word, and what it makes of white space
depends on nothing but this white space and the character behind it. So text may be cut in front of white space that
follows something else, and the ids are those of the chunks one after another. Most chunks have been seen before; those
that have not go to Rust together.
"""

import re
from collections.abc import Iterator

from common.data.word_cache import BoundedCache

CHUNKS = re.compile(r"[ \t\n\r]*[^ \t\n\r]+|[ \t\n\r]+").findall
END_OF_CHUNK = re.compile(r"[^ \t\n\r](?=[ \t\n\r])").search
# White space of other kinds, by Python's idea or by any version of Unicode's, next to which text might be cut:
OTHER_SPACE = re.compile(r"[^\S \t\n\r]|[\u180e\u200b\ufeff]").search
PART_CHARACTERS = 1 << 20  # of a long document are cut at once


class ByteLevelCache(BoundedCache):
    """From a chunk of text, white space in front, to its ids, as bytes."""

    def encode(self, documents: list[str]) -> list[bytes]:
        """The ids of each document, as bytes."""
        ids = [self.encode_by_rust([document]) if OTHER_SPACE(document) else [] for document in documents]
        cut, size = [], 0  # what is looked up together
        for parts, document in zip(ids, documents, strict=True):
            for text in () if parts else _parts(document):
                cut.append((parts, CHUNKS(text)))
                size += len(text)
                if size >= PART_CHARACTERS:
                    self._look_up(cut)
                    cut, size = [], 0
        self._look_up(cut)
        return [b"".join(parts) for parts in ids]

    def _look_up(self, cut: list[tuple[list[bytes], list[str]]]) -> None:
        """Append to each list the ids of the chunks beside it."""
        new = [chunk for chunk in set().union(*(chunks for _, chunks in cut)) if chunk not in self]
        for chunk, ids in zip(new, self.encode_by_rust(new) if new else (), strict=True):
            self.keep(chunk, ids)
        for parts, chunks in cut:
            parts.append(b"".join(map(self.__getitem__, chunks)))

    def __missing__(self, chunk: str) -> bytes:
        return self.keep(chunk, self.encode_by_rust([chunk])[0])  # the cache was full in between


def _parts(document: str) -> Iterator[str]:
    """Cut a long document between two chunks."""
    begin = 0
    while len(document) - begin > PART_CHARACTERS:
        found = END_OF_CHUNK(document, begin + PART_CHARACTERS)
        end = found.end() if found else len(document)
        yield document[begin:end]
        begin = end
    yield document[begin:]


def is_plain_byte_level(tokenizer: dict) -> bool:
    """Whether ByteLevelCache gives a tokenizer's ids.

    Args:
        tokenizer: the content of a tokenizer.json.
    """
    pre, model = tokenizer["pre_tokenizer"] or {}, tokenizer["model"]
    return (
        tokenizer["normalizer"] is None
        and pre.get("type") == "ByteLevel"
        and pre.get("use_regex", True)
        and not pre.get("add_prefix_space")  # would come in front of every chunk
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and all(token["special"] for token in tokenizer["added_tokens"])  # others are looked for across spaces, too
    )
