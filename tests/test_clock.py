"""The budget clock: time counted, agreed between ranks, kept across a resume, repeated from a file."""

import math
import struct
import threading
from functools import partial

import pytest

from common.clock import BudgetClock, read_readings
from common.errors import UserError
from common.schedulers import learning_rate_factor


class FakeTime:
    """A clock that goes only when told to; its zero is arbitrary, as that of time.monotonic."""

    def __init__(self, start=1e5):
        self.seconds = start

    def __call__(self):
        return self.seconds


class FakeRanks:
    """agree_max between threads: each waits for all, then takes the element-wise maximum."""

    def __init__(self, size):
        self.values = [None] * size
        self.barrier = threading.Barrier(size, timeout=10)

    def agree_max(self, rank, values):
        self.values[rank] = values
        self.barrier.wait()
        result = [max(column) for column in zip(*self.values, strict=True)]
        self.barrier.wait()
        return result


def alone(values):
    return values


def advance(clock, now, seconds):
    now.seconds += seconds
    clock.tick()


def test_counts_from_start_and_only_at_ticks():
    now = FakeTime()
    clock = BudgetClock(1.0, alone, now=now)
    now.seconds += 500  # data preparation: not charged
    clock.start()
    advance(clock, now, 900)
    now.seconds += 900
    assert clock.used_hours == 0.25  # the time since the tick is not seen yet, so that all ranks see the same
    assert clock.progress == 0.25 and not clock.expired
    clock.tick()
    assert clock.used_hours == 0.5
    advance(clock, now, 1800)
    assert clock.progress == 1.0 and clock.expired
    advance(clock, now, 1800)
    assert clock.progress == 1.0 and clock.used_hours == 1.5


def test_early_exit_stops_but_keeps_the_schedule():
    now = FakeTime()
    clock = BudgetClock(2.0, alone, early_exit_hours=1.0, now=now)
    clock.start()
    advance(clock, now, 3599)
    assert not clock.expired
    advance(clock, now, 1)
    assert clock.expired and clock.progress == 0.5


def test_an_early_exit_after_the_budget_changes_nothing():
    now = FakeTime()
    clock = BudgetClock(1.0, alone, early_exit_hours=5.0, now=now)
    clock.start()
    advance(clock, now, 3600)
    assert clock.expired and clock.limit_hours == 1.0


def test_without_a_budget_it_never_expires():
    now = FakeTime()
    clock = BudgetClock(None, alone, now=now)
    clock.start()
    advance(clock, now, 1e9)
    assert not clock.expired and clock.progress == 0.0 and clock.used_hours == 1e9 / 3600


def test_one_agreement_per_tick():
    calls = []
    now = FakeTime()
    clock = BudgetClock(1.0, lambda values: calls.append(values) or values, now=now)
    clock.start()
    for _ in range(3):
        advance(clock, now, 60)
        assert clock.progress <= 1 and not clock.expired and clock.passed([0.5]) == []
    assert calls == [[60.0, 0.0], [120.0, 0.0], [180.0, 0.0]]


def test_each_marker_is_reported_once():
    now = FakeTime()
    clock = BudgetClock(1.0, alone, now=now)
    clock.start()
    markers = [0.9, 0.25, 0.5, 1.0]
    seen = []
    for seconds in (600, 600, 1800, 100, 1000):  # up to 0.167, 0.333, 0.833, 0.861, 1.139 of the budget
        advance(clock, now, seconds)
        seen.append(clock.passed(markers))
    assert seen == [[], [0.25], [0.5], [], [0.9, 1.0]]


def test_a_resume_keeps_what_was_used_and_fires_no_marker_again():
    now = FakeTime()
    clock = BudgetClock(1.0, alone, now=now)
    clock.start()
    advance(clock, now, 1800)
    assert clock.passed([0.5, 0.75]) == [0.5]
    now.seconds += 90  # validation and saving between the tick and the state: charged
    state = clock.state_dict()
    now.seconds += 1e6  # lost work and down time: not charged

    other_now = FakeTime(start=7.0)  # a new process, perhaps after a reboot
    resumed = BudgetClock(1.0, alone, now=other_now)
    resumed.load_state_dict(state)
    assert resumed.used_hours == 0.5 and resumed.progress == clock.progress  # the next step's rate is the same
    other_now.seconds += 50  # loading the model
    resumed.start()
    assert resumed.passed([0.5, 0.75]) == []
    advance(resumed, other_now, 10)
    assert resumed.used_hours == pytest.approx(1900 / 3600) and resumed.ticks == 2
    advance(resumed, other_now, 900)
    assert resumed.passed([0.5, 0.75]) == [0.75]


def test_a_finished_run_is_expired_as_soon_as_it_is_loaded():
    now = FakeTime()
    clock = BudgetClock(0.5, alone, now=now)
    clock.start()
    advance(clock, now, 1800)
    resumed = BudgetClock(0.5, alone, now=now)
    resumed.load_state_dict(clock.state_dict())
    assert resumed.expired


def run_two_ranks(work):
    """Run work(rank, agree_max) on two threads; returns their results, or raises what one raised."""
    ranks = FakeRanks(2)
    results = [None, None]

    def target(rank):
        try:
            results[rank] = work(rank, partial(ranks.agree_max, rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_skewed_ranks_see_the_same_time_and_stop_on_the_same_step():
    def work(rank, agree_max):
        now = FakeTime(start=(10.0, 5e6)[rank])
        clock = BudgetClock(0.1, agree_max, is_main=rank == 0, now=now)
        now.seconds += (0, 3000)[rank]  # rank 1 starts late, and its clock runs three times as fast
        clock.start()
        seen = []
        while not clock.expired:
            now.seconds += (20, 60)[rank]
            clock.tick()
            seen.append((clock.used_hours, clock.progress, clock.passed([0.5])))
        return seen

    first, second = run_two_ranks(work)
    assert first == second
    assert len(first) == 18 and first[-1][0] == 0.1  # 18 x 20 s are 0.1 h on rank 0
    assert [marker for _, _, markers in first for marker in markers] == [0.5]


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_on_one_rank_stops_all_on_the_same_step(signalled):
    def work(rank, agree_max):
        now = FakeTime()
        clock = BudgetClock(None, agree_max, is_main=rank == 0, now=now)
        clock.start()
        for step in range(1, 100):
            clock.tick(stop=15 if rank == signalled and step >= 7 else 0)
            if clock.stop:
                return step, clock.stop
        return None

    assert run_two_ranks(work) == [(7, 15), (7, 15)]


def run_with_readings(path, intervals, state=None, replay_file=None):
    """A run, or the rest of one, with ticks at these intervals; returns its state and its progress at each tick."""
    now = FakeTime()
    clock = BudgetClock(1.0, alone, readings_file=path, replay_file=replay_file, now=now)
    if state is not None:
        clock.load_state_dict(state)
    clock.start()
    progress = []
    for interval in intervals:
        advance(clock, now, interval)
        progress.append(clock.progress)
    return clock.state_dict(), progress


INTERVALS = [0.1, 7.3, 1 / 3, 900.7, 13.0]


def test_a_replay_repeats_the_run_exactly(tmp_path):
    _, progress = run_with_readings(tmp_path / "clock", INTERVALS)
    assert (tmp_path / "clock").stat().st_size == 8 * len(INTERVALS)
    _, replayed = run_with_readings(tmp_path / "other", [1e3] * 5, replay_file=tmp_path / "clock")
    assert replayed == progress


def test_a_replay_can_be_interrupted_and_resumed(tmp_path):
    _, progress = run_with_readings(tmp_path / "clock", INTERVALS)
    state, start = run_with_readings(tmp_path / "other", [5.0] * 2, replay_file=tmp_path / "clock")
    _, rest = run_with_readings(tmp_path / "other", [5.0] * 3, state, replay_file=tmp_path / "clock")
    assert start + rest == progress
    assert (tmp_path / "other").read_bytes() == (tmp_path / "clock").read_bytes()


def test_readings_follow_the_run_that_continued_after_a_kill(tmp_path):
    path = tmp_path / "clock"
    state, _ = run_with_readings(path, [10.0, 10.0])
    with open(path, "ab") as file:  # three steps after the checkpoint; the kill came in the middle of writing the next
        file.write(struct.pack("<3d", 30.0, 40.0, 50.0) + b"\x01\x02\x03")
    assert read_readings(path) == [10.0, 20.0, 30.0, 40.0, 50.0]
    run_with_readings(path, [5.0, 5.0], state)
    assert read_readings(path) == [10.0, 20.0, 25.0, 30.0]


def test_a_new_run_starts_a_new_readings_file(tmp_path):
    run_with_readings(tmp_path / "clock", [1.0] * 5)
    run_with_readings(tmp_path / "clock", [3.0])
    assert read_readings(tmp_path / "clock") == [3.0]


def test_readings_lost_before_a_resume_are_refused_by_a_replay(tmp_path):
    state, _ = run_with_readings(tmp_path / "clock", [10.0, 10.0])
    run_with_readings(tmp_path / "elsewhere", [5.0], state)
    readings = read_readings(tmp_path / "elsewhere")
    assert [math.isnan(seconds) for seconds in readings] == [True, True, False]
    with pytest.raises(UserError, match="no reading for step 1;"):
        run_with_readings(tmp_path / "other", [1.0], replay_file=tmp_path / "elsewhere")


def test_a_replay_file_that_is_too_short_ends_all_ranks_with_the_remedy(tmp_path):
    (tmp_path / "clock").write_bytes(struct.pack("<2d", 1.0, 2.0))

    def work(rank, agree_max):
        replay_file = tmp_path / ("clock" if rank == 0 else "only the main rank has the file")
        clock = BudgetClock(1.0, agree_max, is_main=rank == 0, replay_file=replay_file)
        clock.start()
        clock.tick()
        clock.tick()
        assert clock.used_hours == 2 / 3600
        clock.tick()

    for error in run_two_ranks(work):
        assert isinstance(error, UserError) and "no reading for step 3; give the file" in str(error)


def test_a_missing_replay_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: No such file"):
        BudgetClock(1.0, alone, replay_file=tmp_path / "nowhere")


def test_only_the_main_rank_writes_readings(tmp_path):
    clock = BudgetClock(1.0, alone, is_main=False, readings_file=tmp_path / "clock")
    clock.start()
    clock.tick()
    clock.state_dict()
    assert not (tmp_path / "clock").exists()


def test_three_minutes_and_three_days_have_the_same_schedule():
    def curve(budget_hours, steps=200):
        now = FakeTime(start=0.0)
        clock = BudgetClock(budget_hours, alone, now=now)
        clock.start()
        factors = []
        for step in range(1, steps + 1):
            now.seconds = budget_hours * 3600 * step / steps
            clock.tick()
            factors.append(learning_rate_factor(clock.progress, "linear", 0.06))
        assert clock.expired
        return factors

    short, long = curve(0.05), curve(72.0)
    assert short == pytest.approx(long, abs=1e-9)
    assert max(short) == pytest.approx(1.0) and short[-1] == 0.0
