"""Rows of random tokens, for measuring a training run where there is no text."""

import numpy as np

from common.data.masking import random_halves

TRAIN_ROWS, EVAL_ROWS = 1 << 16, 64
SKEW = 4  # token = V * u ** SKEW for even u: frequent and rare tokens, so that there is something to learn


class SyntheticRows:
    """Rows whose tokens are drawn independently, the low ones most often; a function of (seed, row).

    Args:
        vocab_size: V; seq_length: S; number: of rows; seed: int.
    """

    def __init__(self, vocab_size, seq_length, number, seed):
        self.vocab_size, self.seq_length, self.number, self.seed = vocab_size, seq_length, number, seed

    def __len__(self):
        return self.number

    def real_tokens(self, rows, _keys=None):
        """[B] int64: tokens in each row."""
        return np.full(len(rows), self.seq_length)

    def next_tokens(self, rows):
        """[B] int64: tokens in each row that another one follows."""
        return np.full(len(rows), self.seq_length - 1)

    def build(self, rows, _keys=None):
        """As common.data.packing.DocumentRows.build: one document in each row."""
        keys = np.asarray(rows, np.uint64) + (np.uint64(self.seed) << np.uint64(40))
        even = random_halves(keys, self.seq_length) / 2.0**32
        shape = (len(rows), self.seq_length)
        return {
            "input_ids": (self.vocab_size * even**SKEW).astype(np.int64),
            "position_ids": np.broadcast_to(np.arange(self.seq_length), shape).copy(),
            "document_ids": np.ones(shape, np.int64),
            "is_text": np.ones(shape, bool),
        }
