"""Schedule curves against independent closed forms, and the scheduler that applies them."""

import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from transformers import get_scheduler

from common.errors import UserError
from common.schedulers import CURVES, LRScheduler, learning_rate_factor

WARMUP = 0.06


def factor(progress, curve, min_lr_ratio=0.0, **options):
    return learning_rate_factor(progress, curve, WARMUP, min_lr_ratio, **options)


def after_warmup(x):
    return WARMUP + (1 - WARMUP) * x


@pytest.mark.parametrize("curve", CURVES)
def test_ends_of_every_curve(curve):
    end = {"constant": 1.0, "exponential": 0.01, "exp": 0.01}.get(curve, 0.0)
    assert factor(0.0, curve) == 0.0
    assert factor(WARMUP / 2, curve) == pytest.approx(0.5)
    assert factor(WARMUP, curve) == pytest.approx(1.0)
    assert factor(1.0, curve) == pytest.approx(end)
    assert factor(1.7, curve) == factor(1.0, curve)
    assert factor(-0.1, curve) == 0.0


@pytest.mark.parametrize("curve", CURVES)
def test_never_rises_after_the_warmup_and_stays_in_bounds(curve):
    values = [factor(after_warmup(i / 1000), curve, min_lr_ratio=0.1) for i in range(1001)]
    assert all(before >= after for before, after in zip(values, values[1:], strict=False))
    assert min(values) >= 0.1 and max(values) <= 1.0


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warmup_and_nothing_but_warmup(curve, warmup):
    assert learning_rate_factor(0.0, curve, warmup) == (1.0 if warmup == 0 else 0.0)
    if warmup == 1:
        assert learning_rate_factor(0.4, curve, warmup) == 0.4
        assert learning_rate_factor(1.0, curve, warmup) == 1.0


@pytest.mark.parametrize(
    ("curve", "middle"),
    [
        ("linear", 0.5),
        ("cosine", 0.5),
        ("polynomial", 0.5),
        ("exponential", 0.1),
        ("wsd", 1.0),
        ("constant", 1.0),
        ("esd", 1.0),
    ],
)
def test_middle_of_every_curve(curve, middle):
    assert factor(after_warmup(0.5), curve) == pytest.approx(middle)


@pytest.mark.parametrize("alias, name", [("exp", "exponential"), ("trapezoid", "wsd"), ("warmup_stable_decay", "wsd")])
def test_aliases(alias, name):
    assert [factor(i / 50, alias) for i in range(51)] == [factor(i / 50, name) for i in range(51)]


@pytest.mark.parametrize("curve", ["linear", "cosine", "polynomial"])
def test_equals_the_schedule_of_transformers(curve):
    """100 steps with 6 of warm-up; transformers' polynomial ends at a rate of 1e-7, hence the tolerance."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = get_scheduler(curve, optimizer, num_warmup_steps=6, num_training_steps=100)
    for step in range(101):
        assert factor(step / 100, curve) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_options_of_the_curves():
    assert factor(after_warmup(0.5), "polynomial", lr_power=2.0) == pytest.approx(0.25)
    assert factor(after_warmup(0.75), "wsd", decay_proportion=0.5) == pytest.approx(0.5)
    assert factor(after_warmup(0.5), "wsd", decay_proportion=0.5) == pytest.approx(1.0)
    assert factor(1.0, "exponential", exponential_end_ratio=0.2) == pytest.approx(0.2)
    assert factor(after_warmup(0.6), "esd", esd_shrink=2.0, esd_cr_k=0) == 1.0  # 0.5 * 2 = 1: no step goes down
    assert factor(after_warmup(0.6), "esd", esd_cr_k=0) == pytest.approx(math.sqrt(0.5) ** 3)


def test_wsd_is_flat_then_falls_in_a_line():
    assert factor(after_warmup(0.79), "wsd") == 1.0
    assert factor(after_warmup(0.9), "wsd") == pytest.approx(0.5)
    assert factor(after_warmup(0.95), "wsd") == pytest.approx(0.25)


def test_exponential_falls_by_the_same_factor_in_equal_times():
    values = [factor(after_warmup(i / 10), "exponential") for i in range(11)]
    ratios = [after / before for before, after in zip(values, values[1:], strict=False)]
    assert ratios == pytest.approx([0.01**0.1] * 10)


@pytest.mark.parametrize(
    ("x", "value"), [(0.5, 1.0), (0.874, 1.0), (0.876, 0.7071), (0.9, 0.7071), (0.95, 0.3536), (0.99, 0.0625)]
)
def test_elastic_step_decay_is_extremeberts(x, value):
    """What ExtremeBERT's own code gives (shrink 1.4142, cr_k 6), x being the share of the steps after warm-up."""
    assert factor(after_warmup(x), "elastic_step_decay") == pytest.approx(value, abs=1e-4)


def test_elastic_step_decay_halves_when_half_of_the_rest_is_over():
    values = [factor(after_warmup(1 - 0.9 * 0.125 / 2**i), "esd") for i in range(6)]
    assert [after / before for before, after in zip(values, values[1:], strict=False)] == pytest.approx([0.5] * 5)


def test_floor_scales_the_curve():
    for x in (0.0, 0.3, 0.9, 1.0):
        assert factor(after_warmup(x), "linear", min_lr_ratio=0.1) == pytest.approx(0.1 + 0.9 * (1 - x))
    assert factor(0.0, "linear", min_lr_ratio=0.1) == 0.0  # the floor is for the decay, not for the warm-up


def test_a_short_run_has_no_jump_after_the_warmup():
    """ExtremeBERT divides by max(1 hour, time left), so that its half-hour runs fall to 0.47 when warm-up ends."""
    total_hours = 0.5
    just_after = factor((total_hours * WARMUP + 1e-6) / total_hours, "linear")
    theirs = (total_hours - total_hours * WARMUP) / max(1.0, total_hours - total_hours * WARMUP)
    assert theirs == pytest.approx(0.47) and just_after == pytest.approx(1.0, abs=1e-4)


def test_unknown_curve_lists_the_known_ones():
    with pytest.raises(UserError, match="lr_scheduler_type one_cycle: no such curve; .*linear, cosine, .*wsd"):
        factor(0.5, "one_cycle")


def test_an_option_of_another_curve_is_refused():
    with pytest.raises(UserError, match="--lr_power has no effect on --lr_scheduler_type cosine, .*no options"):
        factor(0.5, "cosine", lr_power=2.0)
    with pytest.raises(UserError, match="takes only --esd_shrink, --esd_cr_k"):
        factor(0.5, "esd", lr_power=2.0)


def two_groups():
    first, second = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    return torch.optim.AdamW([{"params": [first], "lr": 1e-3}, {"params": [second], "lr": 4e-3}])


def test_scheduler_scales_every_group():
    optimizer = two_groups()
    scheduler = LRScheduler(optimizer, partial(learning_rate_factor, curve="linear", warmup_proportion=0.0))
    scheduler.step(0.0)
    assert scheduler.get_last_lr() == [1e-3, 4e-3]
    scheduler.step(0.75)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.5e-4, 1e-3])
    scheduler.step(0.5)  # from the progress alone, not from the rate before
    assert scheduler.get_last_lr() == pytest.approx([5e-4, 2e-3])


@pytest.mark.parametrize("made_before_loading", [True, False])
def test_scheduler_needs_no_state_across_a_resume(made_before_loading):
    curve = partial(learning_rate_factor, curve="cosine", warmup_proportion=0.1)
    optimizer = two_groups()
    scheduler = LRScheduler(optimizer, curve)
    scheduler.step(0.6)
    saved = optimizer.state_dict()
    scheduler.step(0.7)

    other = two_groups()
    if made_before_loading:
        resumed = LRScheduler(other, curve)
        other.load_state_dict(saved)
    else:
        other.load_state_dict(saved)
        resumed = LRScheduler(other, curve)
    resumed.step(0.7)
    assert resumed.get_last_lr() == scheduler.get_last_lr()


def test_scheduler_works_on_an_optimizer_prepared_by_accelerate():
    optimizer = two_groups()
    prepared = Accelerator(cpu=True).prepare(optimizer)
    scheduler = LRScheduler(prepared, lambda progress: 1 - progress)
    scheduler.step(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 2e-3]
    assert scheduler.get_last_lr() == [5e-4, 2e-3]
