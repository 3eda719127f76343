"""What the screen shows while a run works: a bar on a terminal, a plain line now and then in a log file."""

import math
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

TERMINAL_SECONDS = 0.1  # shortest time between two updates
LOG_FILE_SECONDS = 10.0


class _Bar(tqdm):
    monitor_interval = 0  # no watcher thread: the bar is drawn when update() says so


class Progress:
    """Share of the budget, time used and left, step, loss and speed; the bar on stderr, notes on stdout.

    Args:
        is_main: False makes every method do nothing.
        label: word in front, e.g. "pretraining".
        now: seconds of a clock that never goes back.
    """

    def __init__(self, is_main: bool, label: str, now: Callable[[], float] = time.monotonic):
        self.is_main = is_main
        self.label = label
        self._now = now
        self._on_terminal = is_main and sys.stderr.isatty()
        self._interval = TERMINAL_SECONDS if self._on_terminal else LOG_FILE_SECONDS
        self._bar = None  # made when there is something to show
        self._shown_at = -math.inf
        self._pending = None  # (share, text) of an update that came too soon after the last one shown

    def update(
        self,
        share_done: float,
        used_seconds: float,
        remaining_seconds: float | None,
        step: int,
        loss: float | None,
        tokens_per_second: float | None,
    ) -> None:
        """Show the state of the run, unless it was shown a moment ago.

        Args:
            share_done: of the limit that is nearest (time, steps or epochs), in [0, 1].
            used_seconds: counted against the budget.
            remaining_seconds: until that limit; None while it cannot be told.
            step: optimizer steps done.
            loss: of the last logged steps; None or NaN before there is one.
            tokens_per_second: real tokens, padding not counted; None before it is known.
        """
        text = f"{format_times(used_seconds, remaining_seconds)}, step {step:,}"
        if loss is not None and not math.isnan(loss):
            text += f", loss {loss:.3g}" if loss < 1 else f", loss {loss:.2f}"
        if tokens_per_second is not None:
            text += f", {format_count(tokens_per_second)} tokens/s"
        self.show(share_done, text)

    def show(self, share_done: float, text: str) -> None:
        """Show a state, unless one was shown a moment ago. Args: share_done: in [0, 1]; text: behind the bar."""
        if not self.is_main:
            return
        self._pending = (min(1.0, max(0.0, share_done)), text)
        if self._now() - self._shown_at >= self._interval:
            self._show()

    def note(self, text: str) -> None:
        """Print a line, or several, without breaking the bar."""
        if not self.is_main:
            return
        if self._on_terminal:
            _Bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Show the last state and leave it on the screen."""
        if self._pending is not None:
            self._show()
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        (share, text), self._pending = self._pending, None
        self._shown_at = self._now()
        if not self._on_terminal:
            print(f"{self.label} {share:4.0%}  {text}", file=sys.stderr, flush=True)
            return
        # The times are the budget clock's, not tqdm's own, so the text goes into the format.
        bar_format = f"{self.label} {share:4.0%} |{{bar}}| {text}"
        if self._bar is None:
            self._bar = _Bar(total=1.0, initial=share, bar_format=bar_format, file=sys.stderr, dynamic_ncols=True)
        self._bar.bar_format = bar_format
        self._bar.n = share
        self._bar.refresh()


def format_times(used: float, remaining: float | None) -> str:
    """65 and 125 seconds -> "1:05<2:05"; None is "?"."""
    return f"{format_duration(used)}<{'?' if remaining is None else format_duration(remaining)}"


def format_duration(seconds: float) -> str:
    """125 -> "2:05", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_count(number: float) -> str:
    """Three digits and a unit: 21_300 -> "21.3k", 4_500_000 -> "4.5M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
