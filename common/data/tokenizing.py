"""Turn a stream of documents into token ids with all cores, in order and in bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np

from common.data.tokenizers import corpus_encoder
from common.data.workers import Workers

BATCH_CHARACTERS = 1 << 20  # below this the pipes cost, above it memory does


def tokenize(
    batches: Iterable[list[str]], backend_json: str, dtype, workers: int, say: Callable[[str], None]
) -> Iterator[tuple]:
    """Tokenize batches of documents, in order.

    Args:
        batches: lists of documents.
        backend_json: the backend tokenizer's to_str().
        dtype: numpy integer type of the ids.
        workers: number of processes of one thread each; 1 works in this one, in as many threads as Rust takes.
        say: called with a line of text where something is out of the ordinary, once.
    Yields:
        (tokens [T] of dtype, lengths int32 [n]) of each batch, documents without a token left out.
    Raises:
        UserError: a worker died.
    """
    batches = iter(batches)
    head = list(islice(batches, 2))
    batches = chain(head, batches)
    small = sum(len(document) for batch in head for document in batch) < BATCH_CHARACTERS
    settings = backend_json, np.dtype(dtype).str
    if workers == 1 or small:  # starting a process takes as long as tokenizing 1 MB
        yield from map(make_batch_encoder(*settings, say), batches)
    else:
        with Workers(make_batch_encoder, workers, flag="--preprocessing_num_workers") as elsewhere:
            yield from elsewhere.map(batches, settings, say)


def make_batch_encoder(backend_json: str, dtype: str, say: Callable[[str], None]) -> Callable:
    """The function from a list of documents to (tokens, lengths), as tokenize() yields them. Args: as tokenize's."""
    encode = corpus_encoder(backend_json, dtype, say)
    return lambda documents: join_ids([ids for ids in encode(documents) if ids], dtype)


def join_ids(sequences: list[bytes], dtype) -> tuple[np.ndarray, np.ndarray]:
    """Ids of documents, as bytes, end to end: (tokens [T] of dtype, lengths int32 [n])."""
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences)) // np.dtype(dtype).itemsize
    return np.frombuffer(b"".join(sequences), dtype), lengths
