"""Texts that share much with others: near-duplicates by MinHash, and n-grams of texts that models are judged by."""

import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from common.errors import UserError, first_line

WORD = re.compile(r"\w+")
# ---- Near-duplicates: Penedo et al. 2024 (FineWeb, arXiv:2406.17557), section 3.4: documents of which 75 % of the
# 5-grams of words are the same share one of the bands with a probability of 77 %.
SHINGLE_WORDS, BANDS, BAND_HASHES = 5, 14, 8
MINHASH_SEED = 1
# ---- Contamination: Brown et al. 2020 (GPT-3, arXiv:2005.14165), appendix C ----
OVERLAP_WORDS = 13
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers lose no bits


def band_hashes(texts):
    """What near-duplicates are likely to have in common. Args: texts: list of d str. Returns: uint64 [BANDS, d]."""
    found = np.empty((BANDS, len(texts)), np.uint64)
    for at, text in enumerate(texts):
        words = [word.encode() for word in WORD.findall(text.lower())]
        shingles = {b" ".join(words[first : first + SHINGLE_WORDS]) for first in range(len(words) - SHINGLE_WORDS + 1)}
        sketch = _minhash().copy()
        sketch.update_batch(list(shingles or {b" ".join(words)}))  # of shorter texts, the whole
        bands = np.asarray(sketch.hashvalues, np.uint64).reshape(BANDS, BAND_HASHES)
        found[:, at] = [int.from_bytes(_digest(number, band), "big") for number, band in enumerate(bands)]
    return found


@cache
def _minhash():
    from datasketch import MinHash

    return MinHash(num_perm=BANDS * BAND_HASHES, seed=MINHASH_SEED, hashfunc=zlib.crc32)


def _digest(number, band):
    from hashlib import blake2b

    return blake2b(number.to_bytes() + band.tobytes(), digest_size=8).digest()


class Contamination:
    """The n-grams of some texts, in 8 bytes each.

    Args:
        files: paths of text files, of which each line is a text; what separates its columns does not matter.
    Raises:
        UserError: one cannot be read.
    """

    def __init__(self, files):
        self.files = [Path(file).name for file in files]
        per_file = [_ngrams_of_file(file) for file in files]
        self.ngrams, first = np.unique(np.concatenate([np.empty(0, np.uint64), *per_file]), return_index=True)
        self.file = np.searchsorted(np.cumsum([len(found) for found in per_file]), first, side="right")

    def where(self, text):
        """Why a text is left out: the name of the file that it shares an n-gram with; None where it shares none."""
        found = ngram_hashes(text)
        if not len(found) or not len(self.ngrams):
            return None
        at = np.minimum(np.searchsorted(self.ngrams, found), len(self.ngrams) - 1)
        common = at[self.ngrams[at] == found]
        return f"{OVERLAP_WORDS} words in a row as in {self.files[self.file[common[0]]]}" if len(common) else None


def ngram_hashes(text):
    """uint64 hashes of a text's runs of OVERLAP_WORDS words, without case and punctuation."""
    words = WORD.findall(text.lower())
    number = len(words) - OVERLAP_WORDS + 1
    if number < 1:
        return np.empty(0, np.uint64)
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    found = np.zeros(number, np.uint64)
    for place in range(OVERLAP_WORDS):
        found = found * MULTIPLIER + (codes[place : place + number] + np.uint64(1))
    return found


def _ngrams_of_file(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return np.unique(np.concatenate([np.empty(0, np.uint64), *map(ngram_hashes, file)]))
    except OSError as error:
        raise UserError(f"--decontaminate {path}: cannot be read ({first_line(error)}); check the path") from error
