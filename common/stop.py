"""Stopping a run from outside: SIGTERM and SIGINT finish the step, save, and end it; a second one ends it at once."""

import os
import signal
import time

ECHO_SECONDS = 1.0  # a launcher passes on the signal that its process group already got; that is not a second one


class StopSignals:
    """Remembers the first SIGTERM or SIGINT, and notices that the launcher has died.

    `accelerate launch` and torchrun can leave their workers running when they are killed; such a worker stops as if
    it had been told to.
    """

    def __init__(self, now=time.monotonic):
        self._now, self._signal, self._since = now, 0, 0.0
        self._parent = os.getppid() if os.environ.get("ACCELERATE_MIXED_PRECISION") else None  # set by the launcher

    def listen(self):
        """Take over SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @property
    def requested(self):
        """The number of the signal that asks to stop, 0 for none."""
        if not self._signal and self._parent is not None and os.getppid() != self._parent:
            self._signal = int(signal.SIGTERM)
        return self._signal

    def _on_signal(self, number, _frame):
        echo = self._parent is not None and self._now() - self._since < ECHO_SECONDS
        if self._signal and not echo:
            os._exit(128 + number)
        if not self._signal:
            self._signal, self._since = number, self._now()
