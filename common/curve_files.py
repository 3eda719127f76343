"""ExtremeBERT's files of learning-rate curves, as --curve customized --curve_conf_file names them:

    [general]
    type = elastic_step_decay

    [hyperparams]
    num_iter = 21620
    interval_shrink_rate = 1.4142
    cr_k = 6

Iterations are optimizer steps behind the warm-up. Source: ExtremeBERT, pretraining/customized_lr_curves.py; here every
curve is a function of the iteration alone, so a continued run follows it, and stays at its end behind num_iter.
"""

import bisect
import configparser
import difflib
import math
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.schedulers import check_curve, elastic_step_decay, exponential, find_curve


def _inverse_time(t, peak, values):
    return 1 / (1 + peak * t * values["lambda"])


def _piecewise_constant(t, peak, values):
    return [1.0, *values["factors"]][bisect.bisect_right(values["starting_points"], t)]


def _cosine(t, peak, values):
    """Half cosines from the peak to min_lr, each t_mul times as long as the one before, the first of t_0."""
    length, floor = values["t_0"], values["min_lr"] / peak
    while t >= length:
        t, length = t - length, length * values["t_mul"]
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t / length))


def _exponential(t, peak, values):
    return values["decay_rate"] ** (t / values["decay_step"])


def _polynomial(t, peak, values):
    return (1 - t / values["num_iter"]) ** values["decay_rate"]


def _steps(t, peak, values):
    return values["decay_rate"] ** -math.floor(t * values["num_interval"] / values["num_iter"])


def _elastic_steps(t, peak, values):
    return elastic_step_decay(t / values["num_iter"], values["interval_shrink_rate"], values["cr_k"])


def _linear(t, peak, values):
    return 1 - t / values["num_iter"]


def _numbers(text):
    return [float(part) for part in text.split(",")]


TYPES = {  # function of (iterations, peak rate, values) giving a share of the peak, and what it takes
    "inverse_time_decay": (_inverse_time, {"lambda": float}),
    "piecewise_constant": (_piecewise_constant, {"starting_points": _numbers, "factors": _numbers}),
    "cosine_decay": (_cosine, {"t_0": int, "t_mul": float, "min_lr": float}),
    "exponential_decay": (_exponential, {"decay_step": int, "decay_rate": float}),
    "poly_remain_time_decay": (_polynomial, {"num_iter": int, "decay_rate": float}),
    "step_decay": (_steps, {"num_iter": int, "num_interval": int, "decay_rate": float}),
    "elastic_step_decay": (_elastic_steps, {"num_iter": int, "interval_shrink_rate": float, "cr_k": int}),
    "linear_decay": (_linear, {"num_iter": int}),
}
OF_ALL = {"activation_point": int, "restarting_points": _numbers}  # where it begins, and begins anew
DECAY_RATE, DECAY_STEP = 0.99, 1000  # ExtremeBERT's defaults of its exp curve
CHECKED = 1000  # points at which a curve is tried


def chosen_curve(args, after_warmup: float) -> tuple[str | Callable[[float], float], dict]:
    """The curve of a run, and its options, as common.schedulers.learning_rate_factor takes them.

    Args:
        args: common.training_arguments.TrainingArguments; after_warmup: steps behind the warm-up, or hours where the
            schedule follows the time.
    Raises:
        UserError: as read_curve_file.
    """
    if args.curve_conf_file:
        return read_curve_file(args.curve_conf_file, after_warmup, args.learning_rate), {}
    if args.decay_rate is None and args.decay_step is None:
        return args.lr_scheduler_type, args.curve_options
    rate = DECAY_RATE if args.decay_rate is None else args.decay_rate
    return exponential, {"exponential_end_ratio": rate ** (after_warmup / (args.decay_step or DECAY_STEP))}


def check_curve_flags(args) -> None:
    """Judge the flags of a curve, ExtremeBERT's among them; raises UserError."""
    if (args.lr_scheduler_type == "customized") != bool(args.curve_conf_file):
        raise UserError("--curve customized and --curve_conf_file belong together: give both or neither")
    if args.curve_conf_file:
        if args.curve_options or args.decay_rate is not None or args.decay_step is not None:
            raise UserError("--curve_conf_file contradicts the options of other curves: write them into the file")
        if args.lr_schedule == "time":
            raise UserError("--curve_conf_file counts steps: give --lr_schedule step and --max_train_steps")
        read_curve_file(args.curve_conf_file, args.max_train_steps or CHECKED, args.learning_rate)
        return
    check_curve(args.lr_scheduler_type, args.curve_options)
    for name in ("decay_rate", "decay_step"):
        value = getattr(args, name)
        if value is not None and find_curve(args.lr_scheduler_type) is not exponential:
            raise UserError(f"--{name} has no effect on --lr_scheduler_type {args.lr_scheduler_type}; leave it out")
        if value is not None and "exponential_end_ratio" in args.curve_options:
            raise UserError(f"--{name} contradicts --exponential_end_ratio: drop one of them")


def read_curve_file(path: str, steps: float, peak_rate: float) -> Callable[[float], float]:
    """The curve that a file describes.

    Args:
        path: of the file; steps: of the run behind the warm-up; peak_rate: the learning rate it falls from.
    Returns:
        function of the share of those steps that is over, in [0, 1], giving a share of the peak rate.
    Raises:
        UserError: the file cannot be read, or says something unknown, or a rate outside [0, peak_rate].
    """
    flag, parser = f"--curve_conf_file {path}", configparser.ConfigParser()
    try:
        parser.read_string(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise UserError(f"{flag} cannot be read: {' '.join(str(error).split())}") from error
    kind = parser.get("general", "type", fallback=None)
    if kind not in TYPES:
        raise UserError(
            f"{flag}: [general] type is {kind}; known are {', '.join(TYPES)}; others can be written as a function, "
            "--lr_scheduler_type path/to/file.py:function"
        )
    function, needed = TYPES[kind]
    given = dict(parser["hyperparams"]) if parser.has_section("hyperparams") else {}
    values = _parse(flag, kind, given, needed)
    points = values.get("restarting_points", [])
    last = values.get("num_iter", math.inf)

    def curve(x):
        t = max(0.0, round(x * steps, 6) - values.get("activation_point", 0))  # rounded: the sum of many steps
        begun = [point for point in points if point <= t]
        return function(min(t - begun[-1] if begun else t, last), peak_rate, values)

    for number in range(CHECKED + 1):
        try:
            share = curve(number / CHECKED)
        except (ArithmeticError, ValueError) as error:
            raise UserError(f"{flag}: {kind} cannot be computed with these values ({error}): change them") from error
        if not 0 <= share <= 1:
            raise UserError(
                f"{flag}: {kind} gives {share:g} of --learning_rate {peak_rate:g}: change what takes it out of [0, 1]"
            )
    return curve


def _parse(flag, kind, given, needed):
    """The values of a type, as numbers."""
    known = {**needed, **OF_ALL}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise UserError(f"{flag}: {kind} takes no {name}: {hint}")
    if missing := [name for name in needed if name not in given]:
        raise UserError(f"{flag}: {kind} needs {', '.join(missing)} under [hyperparams]")
    values = {}
    for name, text in given.items():
        try:
            values[name] = known[name](text)
        except ValueError as error:
            raise UserError(f"{flag}: {name} = {text} is no number of the kind that {kind} takes") from error
    if values.get("t_0", 1) < 1 or values.get("t_mul", 1) < 1:
        raise UserError(f"{flag}: t_0 and t_mul must be at least 1")
    starts, factors = values.get("starting_points", []), values.get("factors", [])
    if len(starts) != len(factors) or starts != sorted(starts):
        raise UserError(f"{flag}: starting_points must go up, and there must be as many factors")
    return values
