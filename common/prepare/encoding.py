"""What a tokenizing process does with a batch of texts: clean, judge, split, tokenize, hash."""

from collections.abc import Callable
from itertools import chain, islice

import numpy as np

from common.data.sources import document_hash
from common.data.tokenizers import corpus_encoder
from common.data.tokenizing import join_ids
from common.data.wikipedia import plain
from common.prepare.cleaning import make_cleaner
from common.prepare.overlap import Contamination, band_hashes

SAMPLES, SAMPLE_CHARACTERS = 3, 200  # of what is left out for a reason
NO_LINE = 0  # instead of the hash of a sequence that is never a repeated line
PARTS = ("document", "sentence", "line")  # what a sequence of a shard can be


def make_shard_encoder(how: dict, say: Callable[[str], None]) -> Callable:
    """The function from a batch of documents to what a shard holds of them.

    Args:
        how: backend_json: the backend tokenizer's to_str(); dtype: numpy integer type of the ids; eod: id that ends
            every document, None for none; part: what is a sequence, of PARTS; language: of the sentences;
            components: labels of the documents that are taken, None for all; preset, fix_unicode: as make_cleaner's;
            decontaminate: files, as Contamination's; near_duplicates: whether documents are prepared for that.
        say: function that prints.
    Returns:
        function of a list of (block as common.data.blocks has them, number of its input) giving a dict; d documents,
        s sequences, what has no token is left out without a word:
            tokens: [T] of dtype; lengths: int32 [s] of the sequences; counts: int32 [d] sequences in a document;
            hashes: uint64 [d] of the texts; characters, words: uint32 [d];
            inputs: list of (number of an input, label); sources: uint16 [d], places in it;
            bands: uint64 [BANDS, d], where asked for; lines: uint64 [s] hashes of the lines, where they are the parts;
            left_out: list of (reason, text); bad_records: list of (where, what) as BadRecords.add() takes them.
    """
    dtype, eod, components = how["dtype"], how["eod"], how["components"]
    encode = corpus_encoder(how["backend_json"], dtype, say)
    clean = make_cleaner(how["preset"], how["fix_unicode"])
    contamination = Contamination(how["decontaminate"]) if how["decontaminate"] else None
    split = _splitter(how["part"], how["language"])
    end = b"" if eod is None else np.array([eod], dtype).tobytes()

    def judge(text):
        text, reason = clean(plain(text))
        return text, reason or (contamination.where(text) if contamination else None)

    def read(batch, bad_records, inputs):
        for block, number in batch:
            for text, label in block.documents(bad_records):
                if components is None or label in components:
                    yield text, inputs.setdefault((number, label), len(inputs))

    def encode_shard(batch):
        bad_records, inputs = FoundBadRecords(), {}
        judged = [(*judge(text), source) for text, source in read(batch, bad_records, inputs)]
        left_out = [(reason, text[:SAMPLE_CHARACTERS]) for text, reason, _ in judged if reason]
        taken = [(text, source, split(text)) for text, reason, source in judged if not reason]
        encoded = iter(encode(list(chain.from_iterable(parts for *_, parts in taken))))
        documents = []  # (text, source, [(part, its ids)])
        for text, source, parts in taken:
            if pairs := [pair for pair in zip(parts, islice(encoded, len(parts)), strict=True) if pair[1]]:
                documents.append((text, source, pairs))
        found = _facts(documents)
        if how["near_duplicates"]:
            found["bands"] = band_hashes([text for text, *_ in documents])
        if how["part"] == "line":  # the end stands by itself: the last line may go
            lines = [[*(line_hash(part) for part, _ in pairs), *([NO_LINE] if end else [])] for *_, pairs in documents]
            found["lines"] = np.fromiter(chain.from_iterable(lines), np.uint64)
            sequences = [[*(ids for _, ids in pairs), *([end] if end else [])] for *_, pairs in documents]
        else:
            sequences = [[ids + end for _, ids in pairs] for *_, pairs in documents]
        found["tokens"], found["lengths"] = join_ids(list(chain.from_iterable(sequences)), dtype)
        found["counts"] = np.fromiter(map(len, sequences), np.int32, len(sequences))
        return found | {"left_out": left_out, "inputs": list(inputs), "bad_records": bad_records.found}

    return encode_shard


class FoundBadRecords:
    """In place of BadRecords where the limit is not known: found is the list of (where, what)."""

    def __init__(self):
        self.found = []

    def add(self, where, what):
        """Keep one."""
        self.found.append((where, what))


def _facts(documents):
    texts = [text for text, *_ in documents]
    columns = {
        "hashes": (np.uint64, map(document_hash, texts)),
        "sources": (np.uint16, (source for _, source, _ in documents)),
        "characters": (np.uint32, map(len, texts)),
        "words": (np.uint32, (len(text.split()) for text in texts)),
    }
    return {name: np.fromiter(values, dtype, len(texts)) for name, (dtype, values) in columns.items()}


def _splitter(part, language):
    if part == "sentence":
        return lambda text: split_sentences(text, language)
    if part == "line":
        return lambda text: text.splitlines(keepends=True)
    return lambda text: [text]


def line_hash(line: str) -> int:
    """What equal lines have in common, white space around them apart; NO_LINE for a blank one."""
    line = line.strip()
    return document_hash(line) or 1 if line else NO_LINE


def split_sentences(text: str, language: str) -> list[str]:
    """The sentences of a text, without the white space around them. Args: language: a code as "en"."""
    from sentencex import segment

    return [sentence for part in segment(language, text) if (sentence := part.strip())]


class Dropped:
    """What was left out and why: reasons is {reason: [count, the first texts' beginnings]}."""

    def __init__(self):
        self.reasons = {}

    def add(self, reason, texts, count=None):
        """Count what is left out. Args: texts: examples, str; count: of all, None: there are no others."""
        entry = self.reasons.setdefault(reason, [0, []])
        entry[0] += len(texts) if count is None else count
        entry[1] += [text[:SAMPLE_CHARACTERS] for text in texts[: SAMPLES - len(entry[1])]]
