"""Map a function over a stream of batches with all cores, in order and in bounded memory.

Each worker is a fresh Python process that imports only what its function needs. A forked one could hang: the parent
may have run OpenMP or Rust threads. A spawned one would import the parent's script again, torch included.
"""

import importlib
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
from pathlib import Path

from common.errors import UserError

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
FAILED = 1  # Python's exit code behind a traceback
ROOT = Path(__file__).resolve().parents[2]


def map_batches(
    batches: Iterable, maker: Callable, settings: tuple, workers: int, say: Callable[[str], None], flag: str
) -> Iterator:
    """Apply a function to batches in other processes, in order.

    Args:
        batches: of anything that can be pickled.
        maker: function at the top of a module; maker(*settings, say) is called once in every process and gives the
            function of a batch. settings: what can be pickled.
        workers: number of processes of one thread each.
        say: called with each line of text that a maker's function says, once.
        flag: that sets the number of workers, for the message.
    Yields:
        the function's result for each batch.
    Raises:
        UserError: a worker died.
    """
    with ExitStack() as stack:
        idle = queue.SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(_Worker(maker, settings, flag)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))  # threads only wait at the workers' pipes

        def apply_elsewhere(batch):
            worker = idle.get()
            try:
                return worker.apply(batch)
            finally:
                idle.put(worker)

        pending, said = deque(), set()

        def finished():
            result, notes = pending.popleft().result()
            for note in notes:
                if note not in said:  # every worker finds the same
                    said.add(note)
                    say(note)
            return result

        for batch in batches:
            pending.append(pool.submit(apply_elsewhere, batch))
            if len(pending) > 2 * workers:
                yield finished()
        while pending:
            yield finished()


class _Worker:
    """A process that reads pickled batches from its standard input and writes pickled results to its output."""

    def __init__(self, maker: Callable, settings: tuple, flag: str):
        self.flag = flag
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.data.workers", maker.__module__, maker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
        )
        self._send(settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # between two batches, or when nobody waits for its result any more
        self.process.communicate()

    def _send(self, what) -> None:
        pickle.dump(what, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def apply(self, batch) -> tuple:
        """(the result, what is to be said)."""
        try:
            self._send(batch)
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            if code == FAILED:
                raise UserError(f"a worker process failed, see above; if memory ran out, lower {self.flag}") from error
            raise UserError(f"a worker process ended with code {code} (out of memory?); lower {self.flag}") from error


def _work(module: str, name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it ends this process when it stops
    requests, results = sys.stdin.buffer, sys.stdout.buffer
    try:
        notes = []
        function = getattr(importlib.import_module(module), name)(*pickle.load(requests), notes.append)
        while True:
            answer = function(pickle.load(requests)), notes
            pickle.dump(answer, results, pickle.HIGHEST_PROTOCOL)
            results.flush()
            notes.clear()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent has gone; there is nobody to write to


if __name__ == "__main__":
    _work(*sys.argv[1:])
