"""Learning-rate schedules: pure functions of progress in [0, 1]. Whether progress is time, steps or epochs is not
their business, so a schedule ends where the run's limit is, for a run of three minutes as for one of three days."""

import inspect
import math
from collections.abc import Callable
from functools import cache

from common.errors import UserError
from common.plugins import is_plugin, load_plugin

# Each curve takes x, the share of the part after warm-up that is over, in [0, 1], and starts with f(0) = 1.


def linear(x: float) -> float:
    """Straight down to 0."""
    return 1 - x


def cosine(x: float) -> float:
    """Half a cosine, down to 0. Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), without restarts."""
    return 0.5 * (1 + math.cos(math.pi * x))


def polynomial(x: float, lr_power: float = 1.0) -> float:
    """(1 - x) ** lr_power, down to 0. The default power is that of transformers' polynomial schedule."""
    return (1 - x) ** lr_power


def exponential(x: float, exponential_end_ratio: float = 0.01) -> float:
    """Falls by the same factor in equal times, to exponential_end_ratio at the end."""
    return exponential_end_ratio**x


def warmup_stable_decay(x: float, decay_proportion: float = 0.2) -> float:
    """Constant, then straight down to 0 over the last decay_proportion (a trapezoid, with the warm-up).

    Source: the length of the decay is that of Hägele et al. 2024 (arXiv:2405.18392), where 20 % equals a cosine.
    """
    return min(1.0, (1 - x) / decay_proportion)


def constant(x: float) -> float:
    """Stays at 1."""
    return 1.0


def elastic_step_decay(x: float, esd_shrink: float = math.sqrt(2), esd_cr_k: int = 6) -> float:
    """Steps that get shorter: a new one begins each time that what remains has shrunk by esd_shrink.

    The first esd_cr_k steps keep the full rate, the others multiply it by min(1, esd_shrink / 2) each. With the
    defaults the rate is constant for 87.5 %, then 0.707 (at 90 %), 0.354 (at 95 %), 0.0625 (at 99 %).

    Source: ExtremeBERT, pretraining/customized_lr_curves.py; the defaults are its pipeline's.
    """
    if x >= 1:
        return 0.0
    step = math.floor(math.log(1 - x) / -math.log(esd_shrink))
    return min(1.0, min(1.0, 0.5 * esd_shrink) ** (step - esd_cr_k + 1))


CURVES = {
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "exponential": exponential,
    "exp": exponential,
    "wsd": warmup_stable_decay,
    "trapezoid": warmup_stable_decay,
    "warmup_stable_decay": warmup_stable_decay,
    "constant": constant,
    "elastic_step_decay": elastic_step_decay,
    "esd": elastic_step_decay,
}
KNOWN_CURVES = f"{', '.join(CURVES)}, or a function as file.py:function"


@cache
def find_curve(curve: str | Callable[..., float]) -> Callable[..., float]:
    """The function of a curve: one of CURVES, or of a user's file.

    Args:
        curve: a key of CURVES, path/to/file.py:function or module:function; or already a function.
    Raises:
        UserError: there is none, or what it gives at 0, 1/2 or 1 is no share of the peak rate.
    """
    if callable(curve):
        return curve
    if curve in CURVES:
        return CURVES[curve]
    flag = f"--lr_scheduler_type {curve}"
    if not is_plugin(curve):
        raise UserError(
            f"{flag}: no such curve; choose one of {', '.join(CURVES)}, or give a function as path/to/file.py:function"
        )
    module_name, found = load_plugin(flag, curve)
    if not callable(found):
        raise UserError(f"{flag}: {module_name} has no function {curve.rpartition(':')[2]}")
    for x in (0.0, 0.5, 1.0):
        try:
            share = float(found(x))
        except Exception as error:  # it is the user's
            fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{flag}: {fault}, when called with {x}, the share of the run that is over") from error
        if not 0 <= share <= 1:
            raise UserError(f"{flag}: gives {share} at {x}; it must be a share of the peak rate, in [0, 1]")
    return found


def check_curve(curve: str | Callable[..., float], options: dict) -> None:
    """Refuse a curve that does not exist and options that belong to another curve.

    Args:
        curve: as find_curve.
        options: the curve options the user gave, by name.
    Raises:
        UserError: naming the known curves, or the options of this one.
    """
    known = list(inspect.signature(find_curve(curve)).parameters)[1:]
    for name in options:
        if name not in known:
            takes = "takes only --" + ", --".join(known) if known else "takes no options"
            raise UserError(f"--{name} has no effect on --lr_scheduler_type {curve}, which {takes}; leave it out")


def learning_rate_factor(
    progress: float, curve: str | Callable[..., float], warmup_proportion: float, min_lr_ratio: float = 0.0, **options
) -> float:
    """The share of the peak learning rate that is in force at this progress.

    The warm-up is a straight line from 0. After it the curve f is laid between the peak and the floor,
    min_lr_ratio + (1 - min_lr_ratio) * f(x), so that it keeps its shape and reaches the floor at the end.

    Args:
        progress: share of the run that is over; outside [0, 1] the nearest end counts.
        curve: as find_curve.
        warmup_proportion: share of the run spent in warm-up, in [0, 1].
        min_lr_ratio: the floor as a share of the peak, in [0, 1].
        options: what the curve takes beside x.
    Returns:
        a number in [0, 1].
    Raises:
        UserError: the curve or one of its options is unknown.
    """
    check_curve(curve, options)
    progress = min(1.0, max(0.0, progress))
    if progress < warmup_proportion:
        return progress / warmup_proportion
    x = (progress - warmup_proportion) / (1 - warmup_proportion) if warmup_proportion < 1 else 0.0
    return min_lr_ratio + (1 - min_lr_ratio) * find_curve(curve)(min(1.0, x), **options)


class LRScheduler:
    """Sets the learning rate of every parameter group from the progress of the run.

    It has no state to save: the rate follows from the progress alone, which clock and step counter keep, so after a
    resume one step(progress) brings it back. The peak rates are the optimizer's when the scheduler is made or, if the
    optimizer's own saved state was loaded before that, the "initial_lr" it holds.

    Args:
        optimizer: a torch optimizer or any wrapper that has its param_groups.
        factor: share of the peak rate at a progress in [0, 1]; mostly a partial of learning_rate_factor.
    """

    def __init__(self, optimizer, factor: Callable[[float], float]):
        self.optimizer = optimizer
        self.factor = factor
        self.base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]

    def step(self, progress: float) -> None:
        """Set the rate of the next update; call it before the first update and after each one."""
        factor = self.factor(progress)
        # The groups are looked up each time, because loading an optimizer's state replaces them.
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor

    def get_last_lr(self) -> list[float]:
        """The learning rate now in force, one per parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]
