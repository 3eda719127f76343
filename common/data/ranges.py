"""Arithmetic on many pieces laid end to end, without a Python loop over them."""

import numpy as np


def ranges(starts, lengths):
    """Concatenation of arange(start, start + length) for each pair.

    Args:
        starts, lengths: [n] integers.
    Returns:
        [sum of lengths] int64.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def window(bounds, first, last):
    """What lies in [first, last) of pieces that are laid end to end.

    Args:
        bounds: [n + 1] int64, 0 and the end of each piece; first, last: int, 0 <= first < last <= bounds[-1].
    Returns:
        (piece, skipped, size), each [m] int64: the piece's number, what of it lies before `first`, what of it lies
        inside.
    """
    piece = np.arange(np.searchsorted(bounds, first, side="right") - 1, np.searchsorted(bounds, last))
    begins = np.maximum(bounds[piece], first)
    return piece, begins - bounds[piece], np.minimum(bounds[piece + 1], last) - begins
