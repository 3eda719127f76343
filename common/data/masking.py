"""Which positions a model must predict: a function of (seed, epoch, row) alone.

B rows, S tokens in a row, k targets in a row.
"""

import numpy as np

MASKED, RANDOM = 0.8, 0.1  # the rest stays as it is; Devlin et al. 2019, section 3.1
ORDER_STREAM, CHOICE_STREAM, ACTION_STREAM, TOKEN_STREAM = range(4)
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
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def derive_key(*parts):
    """A key from integers or integer arrays, one part after another; another order gives another key."""
    key = np.uint64(0)
    for part in parts:
        key = random_bits(key, np.asarray(part, np.uint64))
    return key


def targets_per_row(mlm_probability, seq_length):
    """k, fixed for a run."""
    return max(1, round(mlm_probability * seq_length))


def mask_rows(input_ids, maskable, keys, k, vocab_size, mask_id):
    """Choose k targets in each row and corrupt them 80/10/10.

    Args:
        input_ids: [B, S] int64; changed in place.
        maskable: [B, S] bool: where text stands.
        keys: [B] uint64, one key for each row.
        k: targets in a row.
        vocab_size: random replacements are drawn below it.
        mask_id: id of [MASK].
    Returns:
        (positions, labels, weights): [B, k] int64, int64, float32; positions ascend. A row with less than k positions
        to choose from repeats one of them with weight 0.
    Source: Devlin et al. 2019, section 3.1 (arXiv:1810.04805), with an exact count in place of a rate.
    """
    columns = np.arange(input_ids.shape[1], dtype=np.uint64)
    score = random_bits(derive_key(keys, CHOICE_STREAM)[:, None], columns)
    score = np.where(maskable, score >> np.uint64(1), np.uint64(2**64 - 1))
    chosen = np.argpartition(score, k - 1, axis=1)[:, :k] if k < score.shape[1] else np.argsort(score, axis=1)[:, :k]
    usable = np.take_along_axis(maskable, chosen, axis=1)
    chosen = np.where(usable, chosen, input_ids.shape[1])  # the unusable ones sort behind the others
    chosen.sort(axis=1)
    weights = (chosen < input_ids.shape[1]).astype(np.float32)
    positions = np.where(weights > 0, chosen, np.minimum(chosen[:, :1], input_ids.shape[1] - 1))
    labels = np.take_along_axis(input_ids, positions, axis=1)

    # corrupt by position, not by rank among the chosen, so that a repeated position is treated once
    place = positions.astype(np.uint64)
    action = random_bits(derive_key(keys, ACTION_STREAM)[:, None], place) / 2.0**64
    token = random_bits(derive_key(keys, TOKEN_STREAM)[:, None], place) % np.uint64(vocab_size)
    corrupted = np.where(action < MASKED, mask_id, np.where(action < MASKED + RANDOM, token.astype(np.int64), labels))
    has_text = maskable.any(axis=1, keepdims=True)
    np.put_along_axis(input_ids, positions, np.where(has_text, corrupted, labels), axis=1)
    return positions, labels, weights


def permute(index, size, key):
    """Where index stands in a shuffled sequence of `size`: a permutation without a table.

    Args:
        index: [n] int64 in [0, size).
        size: int, up to 2**62.
        key: uint64; another key, another permutation.
    Returns:
        [n] int64 in [0, size), all different for different indices.
    Source: a balanced Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary domains").
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    round_keys = random_bits(derive_key(key, ORDER_STREAM), np.arange(6, dtype=np.uint64))
    result = np.asarray(index, np.uint64).copy()
    walking = np.arange(len(result))
    while len(walking):  # a value outside [0, size) is permuted again until it falls inside
        left, right = result[walking] >> half, result[walking] & low
        for round_key in round_keys:
            left, right = right, left ^ (random_bits(round_key, right) & low)
        result[walking] = (left << half) | right
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)
