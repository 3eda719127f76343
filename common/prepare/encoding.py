"""What a tokenizing process does with a batch of texts: clean, judge, split, tokenize, hash."""

from collections.abc import Callable
from itertools import chain, islice

import numpy as np

from common.data.sources import document_hash
from common.data.tokenizers import corpus_encoder
from common.data.tokenizing import join_ids
from common.data.wikipedia import plain
from common.prepare.cleaning import make_cleaner

SAMPLES, SAMPLE_CHARACTERS = 3, 200  # of what is left out for a reason


def make_shard_encoder(how: dict, say: Callable[[str], None]) -> Callable:
    """The function from a batch of documents to what a shard holds of them.

    Args:
        how: backend_json: the backend tokenizer's to_str(); dtype: numpy integer type of the ids; eod: id that ends
            every document, None for none; sentences_in: language of the sentences that are sequences, None for whole
            documents; preset, fix_unicode: as make_cleaner's.
        say: function that prints.
    Returns:
        function of (texts, numbers of their sources) giving (tokens [T] of dtype, lengths int32 [n] of the sequences,
        counts int32 [d] of sequences in a document, hashes of the texts uint64 [d], the numbers uint16 [d], list of
        (reason, text) of what is left out); what has no token is left out without a word.
    """
    dtype, language = how["dtype"], how["sentences_in"]
    encode = corpus_encoder(how["backend_json"], dtype, say)
    clean = make_cleaner(how["preset"], how["fix_unicode"])
    end = b"" if how["eod"] is None else np.array([how["eod"]], dtype).tobytes()

    def encode_shard(batch):
        judged = [(*clean(plain(text)), source) for text, source in zip(*batch, strict=True)]
        left_out = [(reason, text[:SAMPLE_CHARACTERS]) for text, reason, _ in judged if reason]
        texts = [text for text, reason, _ in judged if not reason]
        sources = [source for _, reason, source in judged if not reason]
        sequences = [[text] if language is None else split_sentences(text, language) for text in texts]
        encoded = iter(encode(list(chain.from_iterable(sequences))))
        documents = [[ids for ids in islice(encoded, len(parts)) if ids] for parts in sequences]
        kept = [at for at, parts in enumerate(documents) if parts]
        counts = np.fromiter((len(documents[at]) for at in kept), np.int32, len(kept))
        hashes = np.fromiter((document_hash(texts[at]) for at in kept), np.uint64, len(kept))
        numbers = np.fromiter((sources[at] for at in kept), np.uint16, len(kept))
        parts = [ids + end for at in kept for ids in documents[at]]
        return *join_ids(parts, dtype), counts, hashes, numbers, left_out

    return encode_shard


def split_sentences(text: str, language: str) -> list[str]:
    """The sentences of a text, without the white space around them. Args: language: a code as "en"."""
    from sentencex import segment

    return [sentence for part in segment(language, text) if (sentence := part.strip())]


class Dropped:
    """What was left out and why: reasons is {reason: [count, the first texts' beginnings]}."""

    def __init__(self):
        self.reasons = {}

    def add(self, left_out):
        """Count. Args: left_out: list of (reason, text)."""
        for reason, text in left_out:
            entry = self.reasons.setdefault(reason, [0, []])
            entry[0] += 1
            if len(entry[1]) < SAMPLES:
                entry[1].append(text)
