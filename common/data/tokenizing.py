"""Turn a stream of documents into token ids with all cores, in order and in bounded memory.

Each worker is a fresh Python process that imports only numpy and tokenizers. A forked one could hang: the parent may
have run OpenMP or Rust threads. A spawned one would import the parent's script again, torch included.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np

from common.data.tokenizers import corpus_encoder
from common.errors import UserError

BATCH_CHARACTERS = 1 << 20  # below this the pipes cost, above it memory does
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[2]


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
    if workers == 1 or small:  # starting a process takes as long as tokenizing 1 MB
        encode = corpus_encoder(backend_json, dtype, say)
        yield from (_encode(encode, batch, dtype) for batch in batches)
        return
    with ExitStack() as stack:
        idle = queue.SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(_Worker(backend_json, dtype)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))  # threads only wait at the workers' pipes

        def encode_elsewhere(batch: list[str]):
            worker = idle.get()
            try:
                return worker.encode(batch)
            finally:
                idle.put(worker)

        pending, said = deque(), []

        def finished():
            tokens, lengths, notes = pending.popleft().result()
            if notes and not said:  # every worker finds the same
                say(notes[0])
                said.extend(notes)
            return tokens, lengths

        for batch in batches:
            pending.append(pool.submit(encode_elsewhere, batch))
            if len(pending) > 2 * workers:
                yield finished()
        while pending:
            yield finished()


def _encode(encode, documents: list[str], dtype) -> tuple[np.ndarray, np.ndarray]:
    sequences = [ids for ids in encode(documents) if ids]
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences)) // np.dtype(dtype).itemsize
    return np.frombuffer(b"".join(sequences), dtype), lengths


class _Worker:
    """A process that reads pickled batches from its standard input and writes pickled results to its output."""

    def __init__(self, backend_json: str, dtype):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.data.tokenizing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
        )
        self._send((backend_json, np.dtype(dtype).str))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # between two batches, or when nobody waits for its result any more
        self.process.communicate()

    def _send(self, what) -> None:
        pickle.dump(what, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def encode(self, documents: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """As _encode, and what is to be said."""
        try:
            self._send(documents)
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            raise UserError(
                f"a tokenizing process ended with code {code} (out of memory?); lower --preprocessing_num_workers"
            ) from error


def _work() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it ends this process when it stops
    requests, results = sys.stdin.buffer, sys.stdout.buffer
    try:
        backend_json, dtype = pickle.load(requests)
        notes = []
        encode = corpus_encoder(backend_json, dtype, notes.append)
        while True:
            answer = (*_encode(encode, pickle.load(requests), dtype), notes)
            pickle.dump(answer, results, pickle.HIGHEST_PROTOCOL)
            results.flush()
            notes.clear()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent has gone; there is nobody to write to


if __name__ == "__main__":
    _work()
