"""Which positions a model must predict: a function of (seed, epoch, row) alone.

B rows, S tokens in a row, k targets in a row.
"""

import numpy as np

REPLACED = 8, 1, 10  # of ten 8 become [MASK], 1 a random token, 1 stays as it is (Devlin et al. 2019, section 3.1)
ORDER_STREAM, CHOICE_STREAM, CORRUPTION_STREAM, RUN_STREAM, PAIR_STREAM, SAMPLING_STREAM, LABEL_STREAM = range(7)
NOT_TEXT = np.uint32(2**32 - 1)  # above every score
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_bits(key, counter):
    """Independent 64-bit numbers addressed by (key, counter): the output function of SplitMix64.

    Args:
        key, counter: uint64 arrays (or scalars) that broadcast together.
    Returns:
        uint64 array.
    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    with np.errstate(over="ignore"):
        x = np.asarray(key, np.uint64) + (np.asarray(counter, np.uint64) + np.uint64(1)) * _GOLDEN
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        return x


def derive_key(*parts):
    """A key from integers or integer arrays, one part after another; another order gives another key."""
    key = np.uint64(0)
    for part in parts:
        key = random_bits(key, np.asarray(part, np.uint64))
    return key


def targets_per_row(mlm_probability, seq_length):
    """k, fixed for a run."""
    return max(1, round(mlm_probability * seq_length))


def choose_tokens(is_text, keys, k, limits=None):
    """Choose k tokens of each row.

    Args:
        is_text: [B, S] bool; keys: [B] uint64, one key for each row; k: targets in a row.
        limits: [B] int64, up to k: fewer of them; None: k.
    Returns:
        [B, k] uint32 positions, ascending; NOT_TEXT for what a row has too few of.
    """
    width = is_text.shape[1]
    score = _scores(derive_key(keys, CHOICE_STREAM), width)
    score[~is_text] = NOT_TEXT
    lowest = np.partition(score, k - 1, axis=1)[:, :k]
    if limits is not None:
        lowest.sort(axis=1)
        lowest[np.arange(k) >= limits[:, None]] = NOT_TEXT
    chosen = np.where(lowest < NOT_TEXT, lowest & column_bits(width), NOT_TEXT)  # what is not text sorts behind
    chosen.sort(axis=1)
    return chosen


def replace_tokens(input_ids, chosen, keys, vocab_size, mask_id, replaced=REPLACED):
    """Take the chosen tokens out of rows.

    Args:
        input_ids: [B, S] int64, C-contiguous; changed in place.
        chosen: [B, k] uint32, as choose_tokens gives them.
        keys: [B] uint64, one key for each row.
        vocab_size: random replacements are drawn below it; mask_id: id of [MASK].
        replaced: (masked, random, of): of so many `masked` become [MASK], `random` become another token.
    Returns:
        (positions, labels, weights): [B, k] int64, int64, float32; positions ascend. A row with less than k positions
        to choose from repeats one of them with weight 0.
    Source: Devlin et al. 2019, section 3.1 (arXiv:1810.04805), with an exact count in place of a rate.
    """
    (rows, width), k = input_ids.shape, chosen.shape[1]
    usable = chosen < NOT_TEXT
    positions = np.where(usable, chosen, np.minimum(chosen[:, :1], width - 1)).astype(np.int64)
    flat_ids, place = input_ids.reshape(-1), positions + np.arange(rows)[:, None] * width
    labels = flat_ids[place]

    # one number below, say, 10 V decides: 8 V of them mean [MASK], V of them name a token, the last V leave it
    masked, other, of = replaced
    number = random_halves(derive_key(keys, CORRUPTION_STREAM), k) * np.uint64(of * vocab_size) >> np.uint64(32)
    number = number.astype(np.int64)
    masked_below, random_below = masked * vocab_size, (masked + other) * vocab_size
    token = number - masked_below if other == 1 else (number - masked_below) // max(other, 1)
    unmasked = np.where(number < random_below, token, labels)
    corrupted = np.where(number < masked_below, mask_id, unmasked)
    flat_ids[place[usable]] = corrupted[usable]
    return positions, labels, usable.astype(np.float32)


def random_halves(keys, number):
    """[B, number] uint32: random numbers of a row, two from each 64-bit one."""
    draws = random_bits(keys[:, None], np.arange((number + 1) // 2))
    return draws.astype("<u8", copy=False).view("<u4")[:, :number]


def _scores(keys, width):
    """A random number for each position of each row, whose lowest bits are the position.

    So the k lowest are k positions without replacement, and numbers of 32 bits are sorted ten times as fast as numbers
    of 64 bits, or indices. 31 bits, less those of the position, are random. Where two scores are equal but for the
    position, the left one is lower; for one row of 128 in 100,000 that makes a difference.

    Args:
        keys: [B] uint64; width: S.
    Returns:
        [B, S] uint32, below NOT_TEXT.
    """
    score = random_halves(keys, width) & (np.uint32(2**31 - 1) ^ column_bits(width))
    score |= np.arange(width, dtype=np.uint32)
    return score


def column_bits(width):
    """The bits of a uint32 that number `width` columns."""
    return np.uint32((1 << (width - 1).bit_length()) - 1)


def permute(index, size, key):
    """Where index stands in a shuffled sequence of `size`: a permutation without a table.

    Args:
        index: [n] int64 in [0, size).
        size: int, up to 2**62.
        key: uint64; another key, another permutation.
    Returns:
        [n] int64 in [0, size), all different for different indices.
    Source: a Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary domains").
    """
    bits = max(2, int(size - 1).bit_length())
    widths = np.uint64(bits // 2), np.uint64(bits - bits // 2)  # of the two halves, which change places each round
    round_keys = random_bits(derive_key(key, ORDER_STREAM), np.arange(6, dtype=np.uint64))
    result = np.asarray(index, np.uint64).copy()
    walking = np.arange(len(result))
    while len(walking):  # a value outside [0, size) is permuted again until it falls inside
        (left_width, right_width), value = widths, result[walking]
        left, right = value >> right_width, value & _ones(right_width)
        for round_key in round_keys:
            left, right = right, left ^ (random_bits(round_key, right) & _ones(left_width))
            left_width, right_width = right_width, left_width
        result[walking] = value = (left << right_width) | right
        walking = walking[value >= size]
    return result.astype(np.int64)


def _ones(width):
    return (np.uint64(1) << width) - np.uint64(1)
