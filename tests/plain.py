"""Plain stand-ins that several tests share: a token file in memory, the ids of a tokenizer."""

from types import SimpleNamespace

import numpy as np

TOKENIZER = SimpleNamespace(cls_token_id=2, sep_token_id=3, pad_token_id=0, mask_token_id=4)


def token_file(lengths):
    """Documents whose tokens are all different, so that each can be followed."""
    lengths = np.asarray(lengths, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    tokens = np.arange(10, 10 + lengths.sum(), dtype=np.int32)
    return SimpleNamespace(tokens=tokens, starts=starts, lengths=lengths)
