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
PIPE_BYTES = 1 << 20  # what Linux grants everybody: a batch is sent without waiting for its reader
ROOT = Path(__file__).resolve().parents[2]


class Workers:
    """Processes that apply a function to batches, in order; a context manager that ends them.

    Args:
        maker: function at the top of a module; maker(*settings, say) is called once in every process and gives the
            function of a batch.
        number: of processes of one thread each; 1 works in this one, in one thread.
        flag: that sets the number, for the message.
    """

    def __init__(self, maker: Callable, number: int, flag: str):
        self.maker, self.number, self.flag = maker, number, flag
        self.stack, self.workers, self.said = ExitStack(), [], set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    def start(self) -> None:
        """Let them import what they need, while this process does something else; map() starts them otherwise."""
        if self.number > 1 and not self.workers:
            self.workers = [self.stack.enter_context(_Worker(self.maker, self.flag)) for _ in range(self.number)]

    def map(self, batches: Iterable, settings: tuple, say: Callable[[str], None]) -> Iterator:
        """Apply the function.

        Args:
            batches: of anything that can be pickled.
            settings: what can be pickled; of the first call, for all of them.
            say: called with each line of text that the function says, once.
        Yields:
            the function's result for each batch.
        Raises:
            UserError: a worker died.
        """
        if self.number == 1:
            os.environ.update(ONE_THREAD)  # read by Rust at each call
            yield from map(self.maker(*settings, say), batches)
            return
        self.start()
        idle = queue.SimpleQueue()
        for worker in self.workers:
            worker.set_up(settings)
            idle.put(worker)

        def apply_elsewhere(batch):
            worker = idle.get()
            try:
                return worker.apply(batch)
            finally:
                idle.put(worker)

        pending = deque()

        def finished():
            result, notes = pending.popleft().result()
            for note in notes:
                if note not in self.said:  # every worker finds the same
                    self.said.add(note)
                    say(note)
            return result

        with ThreadPoolExecutor(self.number) as pool:  # threads only wait at the workers' pipes
            for batch in batches:
                pending.append(pool.submit(apply_elsewhere, batch))
                if len(pending) > 2 * self.number:
                    yield finished()
            while pending:
                yield finished()


class _Worker:
    """A process that reads pickled batches from its standard input and writes pickled results to its output."""

    def __init__(self, maker: Callable, flag: str):
        self.flag, self.is_set_up = flag, False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.data.workers", maker.__module__, maker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            pipesize=PIPE_BYTES,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # between two batches, or when nobody waits for its result any more
        self.process.communicate()

    def _send(self, what) -> None:
        pickle.dump(what, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def set_up(self, settings: tuple) -> None:
        """Send what its function is made from, once."""
        if not self.is_set_up:
            self._send(settings)
            self.is_set_up = True

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
