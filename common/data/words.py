"""Whole words, or runs of several, as what a model must predict: a function of (seed, epoch, row) alone.

B rows, S tokens in a row, k targets in a row, W words in the row that has most.
"""

import numpy as np

from common.data.masking import CHOICE_STREAM, NOT_TEXT, RUN_STREAM, column_bits, derive_key, random_halves
from common.data.ranges import ranges

RUN_WORDS = 3  # most words in a run (Shoeybi et al. 2019, arXiv:1909.08053; SpanBERT's rule of 1/n)


def word_begins(tokenizer):
    """Which tokens begin a word: bool [V].

    Args:
        tokenizer: transformers' fast one of WordPiece ("##" goes on), byte-level BPE ("Ġ" begins) or Unigram ("▁").
    """
    model = tokenizer.backend_tokenizer.model
    vocabulary = tokenizer.get_vocab()
    found = np.ones(max(vocabulary.values()) + 1, bool)
    prefix = getattr(model, "continuing_subword_prefix", None)
    for token, number in vocabulary.items():
        found[number] = not token.startswith(prefix) if prefix else token.startswith(("Ġ", "Ċ", "▁"))
    return found


def choose_words(is_text, begins, keys, k, most, limits=None):
    """Choose words in random order, each with up to most - 1 that follow it, until k positions are chosen.

    A run of n words comes up in proportion to 1/n; one that is too long for what is missing loses words at its end,
    one that meets a chosen word is left out. Only where no word fits any more is one cut, so that rows of equal text
    have equally many targets.

    Args:
        is_text: [B, S] bool; begins: [B, S] bool: tokens that begin a word; text behind what is no text does, too.
        keys: [B] uint64, one key for each row; k: targets in a row; most: words in a run.
        limits: [B] int64, up to k: fewer targets; None: k.
    Returns:
        [B, k] uint32 positions as choose_tokens gives them: k in each row, or all its text where that is less.
    Source: Megatron-LM's create_masked_lm_predictions (Shoeybi et al. 2019), for all rows at once.
    """
    words = _Words(is_text, begins, most)
    order = words.in_order(derive_key(keys, CHOICE_STREAM))
    size = words.run_words(derive_key(keys, RUN_STREAM))
    taken = np.zeros((len(keys), words.most_words + most), bool)
    limits = np.full(len(keys), k) if limits is None else limits
    room = limits.copy()
    row = np.arange(len(keys))
    for rank in range(words.most_words):
        row = row[(room[row] > 0) & (rank < words.counts[row])]
        if not len(row):
            break
        word = order[row, rank]
        number = size[row, word]
        for _ in range(most):
            number -= words.tokens(row, word, number) > room[row]
        free = number > 0
        for place in range(most):
            free &= ~taken[row, word + place] | (place >= number)
        for place in range(most):
            inside = free & (place < number)
            taken[row[inside], word[inside] + place] = True
        room[row] -= np.where(free, words.tokens(row, word, number), 0)
    chosen = is_text & np.take_along_axis(taken, words.of_token, axis=1)
    short = np.flatnonzero(np.minimum(limits, is_text.sum(axis=1)) > chosen.sum(axis=1))
    if len(short):
        rank = np.empty((len(short), words.most_words), np.int64)
        np.put_along_axis(rank, order[short], np.arange(words.most_words)[None], axis=1)
        width = is_text.shape[1]
        score = np.take_along_axis(rank, words.of_token[short], axis=1) * width + np.arange(width)
        score[~is_text[short] | chosen[short]] = np.iinfo(np.int64).max
        place = np.argsort(score, axis=1).argsort(axis=1)
        chosen[short] |= (place < room[short, None]) & is_text[short]
    row, column = np.nonzero(chosen)
    positions = np.full((len(keys), k), NOT_TEXT)
    positions[row, ranges(np.zeros(len(keys), np.int64), chosen.sum(axis=1))] = column
    return positions


class _Words:
    """Where the words of rows begin and end.

    Attributes: counts: [B]; most_words: W; of_token: [B, S] number of the word that a token is in, 0 before the first.
    """

    def __init__(self, is_text, begins, most):
        rows, width = is_text.shape
        self.most, self.width = most, width
        begins = begins & is_text
        begins[:, 0] |= is_text[:, 0]
        begins[:, 1:] |= is_text[:, 1:] & ~is_text[:, :-1]
        self.counts = begins.sum(axis=1)
        self.most_words = int(self.counts.max(initial=1))
        self.of_token = np.maximum(np.cumsum(begins, axis=1) - 1, 0)
        row, start = np.nonzero(begins)
        number = ranges(np.zeros_like(self.counts), self.counts)
        bounds = np.ones((rows, width + 1), bool)
        bounds[:, :-1] = begins | ~is_text
        bounds = np.flatnonzero(bounds)
        end = bounds[np.searchsorted(bounds, row * (width + 1) + start, side="right")] - row * (width + 1)
        self.starts = np.full((rows, self.most_words + most), width)
        self.ends = np.full((rows, self.most_words + most), width)
        self.starts[row, number], self.ends[row, number] = start, end

    def in_order(self, keys):
        """[B, W] int64: the words of each row in random order, those that are there first."""
        bits = column_bits(self.width)  # not of W: what stands in other rows must change nothing
        number = np.arange(self.most_words, dtype=np.uint32)
        score = random_halves(keys, self.most_words) & (np.uint32(2**31 - 1) ^ bits) | number
        score[number[None] >= self.counts[:, None]] |= np.uint32(2**31)
        score.sort(axis=1)
        return (score & bits).astype(np.int64)

    def run_words(self, keys):
        """[B, W] int64: how many words a run from each word has: n by 1/n among those that text allows."""
        draw = random_halves(keys, self.most_words)
        reach = np.ones(draw.shape, np.int64)
        for following in range(1, self.most):
            goes_on = self.ends[:, following - 1 : following - 1 + self.most_words]
            goes_on = goes_on == self.starts[:, following : following + self.most_words]
            there = following + np.arange(self.most_words) < self.counts[:, None]
            reach += (reach == following) & goes_on & there
        bounds = np.full((self.most + 1, self.most), 2**32, np.uint64)
        for longest in range(1, self.most + 1):
            weights = 1 / np.arange(1, longest + 1)
            bounds[longest, : longest - 1] = (np.cumsum(weights / weights.sum())[:-1] * 2**32).astype(np.uint64)
        return 1 + sum((draw >= bounds[reach, place]).astype(np.int64) for place in range(self.most))

    def tokens(self, row, word, number):
        """[n] int64: tokens in runs of `number` words, 0 where that is 0."""
        return np.where(number > 0, self.ends[row, word + np.maximum(number, 1) - 1] - self.starts[row, word], 0)
