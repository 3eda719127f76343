"""The wall-clock budget of a run: one reading for all ranks, kept across a resume, repeatable from a file."""

import math
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError

READING = struct.Struct("<d")  # one entry of a readings file: seconds used, little-endian float64


class BudgetClock:
    """Counts the hours a run has used against its budget; the answers are the same on every rank.

    Args:
        budget_hours: the schedule ends, and the run stops, at this time; None for a run without a time limit.
        agree_max: element-wise maximum over all ranks of a list of floats; called once per tick.
        early_exit_hours: stop already here; the schedule keeps the longer budget.
        is_main: True on the one rank whose clock counts.
        readings_file: every reading of the main rank is added to this file, whenever the state is saved, so that the
            run can be repeated exactly.
        replay_file: a readings file; tick number n takes its reading n instead of the time.
        now: seconds of a clock that never goes back.
    Raises:
        UserError: the replay file cannot be read.
    """

    def __init__(
        self,
        budget_hours: float | None,
        agree_max: Callable[[list[float]], list[float]],
        early_exit_hours: float | None = None,
        is_main: bool = True,
        readings_file: Path | None = None,
        replay_file: Path | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.budget_hours = budget_hours
        self.limit_hours = min((h for h in (budget_hours, early_exit_hours) if h is not None), default=math.inf)
        self.ticks = 0  # optimizer steps counted so far
        self.stop = 0  # the signal number that any rank reported at the last tick, or 0
        self._agree_max = agree_max
        self._is_main = is_main
        self._readings_path = readings_file if is_main else None
        self._new_readings = bytearray()  # not yet in the file
        self._replay_path = replay_file
        self._replay = read_readings(replay_file) if replay_file is not None and is_main else None
        self._now = now
        self._started_at = None
        self._seconds_before_start = 0.0
        self._seconds = 0.0  # the reading of the last tick; schedules and limits see only this
        self._markers_until = -1.0  # progress up to which markers have been reported

    def start(self) -> None:
        """Begin counting, or go on from the loaded state: what was used before is kept, down time is not charged."""
        self._started_at = self._now()
        if self._readings_path is None:
            return
        # Steps after the checkpoint are done again, so their readings go. Readings that are missing (the file was not
        # copied with the checkpoint) become NaN, which a replay refuses, rather than a time that was never read.
        with open(self._readings_path, "ab") as file:
            entries = min(self.ticks, file.tell() // READING.size)
            file.truncate(entries * READING.size)
            file.write(READING.pack(math.nan) * (self.ticks - entries))

    def tick(self, stop: int = 0) -> None:
        """Agree with the other ranks on the time and on whether to stop; once per optimizer step, on every rank.

        Args:
            stop: number of the signal this rank has received, or 0.
        Raises:
            UserError: the replay file has no reading for this tick; on all ranks at once.
        """
        reading, self.stop = self._agree_max([self._read() if self._is_main else -1.0, float(stop)])
        self.stop = int(self.stop)
        if math.isinf(reading):
            raise UserError(
                f"--replay_clock {self._replay_path}: no reading for step {self.ticks + 1}; "
                "give the file of a run that went at least as far, or stop earlier with --max_train_steps"
            )
        self._seconds = reading
        self.ticks += 1
        if self._readings_path is not None:
            self._new_readings += READING.pack(reading)

    @property
    def used_hours(self) -> float:
        """Hours counted at the last tick."""
        return self._seconds / 3600

    @property
    def progress(self) -> float:
        """Share of the budget used at the last tick, in [0, 1]; 0 without a budget."""
        return 0.0 if self.budget_hours is None else min(1.0, self.used_hours / self.budget_hours)

    @property
    def expired(self) -> bool:
        """True once the budget or the early exit time is reached."""
        return self.used_hours >= self.limit_hours

    def passed(self, markers: Sequence[float]) -> list[float]:
        """The markers passed since the last call; each is reported once, also across a resume.

        Args:
            markers: fractions of the budget, in any order.
        """
        since, self._markers_until = self._markers_until, self.progress
        return [marker for marker in sorted(markers) if since < marker <= self.progress]

    def state_dict(self) -> dict:
        """What a resumed run must know; puts the readings so far on disk first, so that they are never behind it."""
        if self._new_readings:
            with open(self._readings_path, "ab") as file:
                file.write(self._new_readings)
                file.flush()
                os.fsync(file.fileno())
            self._new_readings.clear()
        return {
            "ticks": self.ticks,
            "reading_seconds": self._seconds,
            # Later than the reading by what evaluation and saving took since: that is charged too.
            "charged_seconds": self._seconds if self._replay_path is not None else self._elapsed(),
            "markers_until": self._markers_until,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a saved state; call it before start()."""
        self.ticks = state["ticks"]
        self._seconds = state["reading_seconds"]
        self._seconds_before_start = state["charged_seconds"]
        self._markers_until = state["markers_until"]

    def _read(self) -> float:
        if self._replay is None:
            return self._elapsed()
        reading = self._replay[self.ticks] if self.ticks < len(self._replay) else math.nan
        return reading if reading >= 0 else math.inf  # infinity is the largest value, so every rank hears of it

    def _elapsed(self) -> float:
        if self._started_at is None:
            return self._seconds_before_start
        return self._seconds_before_start + self._now() - self._started_at


def read_readings(path: Path) -> list[float]:
    """The seconds in a readings file, one per tick; a last entry that was cut off is left out.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--replay_clock {path}: {error.strerror}; give the readings file that a run left") from error
    whole = len(content) - len(content) % READING.size
    return [seconds for (seconds,) in READING.iter_unpack(content[:whole])]
