"""ExtremeBERT's flags of schedules: what its files and its exp curve say, against its formulas written out."""

import math

import pytest

from common.arguments import parse_pretraining_arguments
from common.curve_files import TYPES, chosen_curve, read_curve_file
from common.errors import UserError
from pretraining import small_run, training_rows

PEAK, STEPS = 0.1, 94  # a run of 100 steps with 6 of warm-up
FILES = {  # values, and the rate after t steps, as ExtremeBERT's documentation has it
    "linear_decay": ({"num_iter": 94}, lambda t: PEAK * (94 - t) / 94),
    "poly_remain_time_decay": ({"num_iter": 94, "decay_rate": 2.0}, lambda t: PEAK * (1 - t / 94) ** 2),
    "exponential_decay": ({"decay_step": 10, "decay_rate": 0.9}, lambda t: PEAK * 0.9 ** (t / 10)),
    "inverse_time_decay": ({"lambda": 3.0}, lambda t: PEAK / (1 + PEAK * t * 3)),
    "step_decay": (
        {"num_iter": 94, "num_interval": 4, "decay_rate": 10.0},
        lambda t: PEAK * 0.1 ** min(t // 23.5, 4),
    ),
    "piecewise_constant": (
        {"starting_points": "10, 50", "factors": "0.5, 0.25"},
        lambda t: PEAK * (1 if t < 10 else 0.5 if t < 50 else 0.25),
    ),
    "cosine_decay": (
        {"t_0": 20, "t_mul": 2.0, "min_lr": 0.02},
        lambda t: 0.06 + 0.04 * math.cos(math.pi * (t / 20 if t < 20 else (t - 20) / 40 if t < 60 else (t - 60) / 80)),
    ),
    "elastic_step_decay": (
        {"num_iter": 94, "interval_shrink_rate": 1.4142, "cr_k": 6},
        lambda t: 0 if t == 94 else PEAK * min(1, 0.7071 ** (math.floor(math.log(94 / (94 - t)) / 0.346564) - 5)),
    ),
}


@pytest.fixture
def curve_file(tmp_path):
    """A function of a type and values, giving the path of a file."""

    def write(kind, **values):
        lines = ["[general]", f"type = {kind}", "[hyperparams]"]
        lines += [f"{name} = {value}" for name, value in values.items()]
        (tmp_path / "curve.conf").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "curve.conf")

    return write


def test_every_type_is_tried():
    assert FILES.keys() == TYPES.keys()


@pytest.mark.parametrize("kind", FILES)
def test_a_file_gives_extremeberts_rates(curve_file, kind):
    values, rate = FILES[kind]
    curve = read_curve_file(curve_file(kind, **values), STEPS, PEAK)
    for step in range(STEPS + 1):
        assert PEAK * curve(step / STEPS) == pytest.approx(rate(step), rel=1e-4, abs=1e-12), step


def test_it_begins_at_its_activation_point_and_anew_at_others(curve_file):
    path = curve_file("linear_decay", num_iter=40, activation_point=10, restarting_points="0, 40")
    curve = read_curve_file(path, STEPS, PEAK)
    at = lambda step: round(curve(step / STEPS), 9)  # noqa: E731
    assert [at(step) for step in (0, 10, 30, 49, 50, 70, 90, 94)] == [1, 1, 0.5, 0.025, 1, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("lineardecay", {"num_iter": 5}, r"\[general\] type is lineardecay; known are inverse_time_decay, .*file.py"),
        ("continuous_eigencurve", {"num_iter": 5}, "known are"),
        ("linear_decay", {}, "linear_decay needs num_iter under"),
        ("linear_decay", {"num_iters": 5, "num_iter": 4}, "takes no num_iters: did you mean num_iter?"),
        ("linear_decay", {"num_iter": "many"}, "num_iter = many is no number"),
        ("linear_decay", {"num_iter": 0}, "cannot be computed"),
        ("exponential_decay", {"decay_step": 1, "decay_rate": 1.1}, "of --learning_rate 0.1: change"),
        ("cosine_decay", {"t_0": 0, "t_mul": 1, "min_lr": 0}, "t_0 and t_mul must be at least 1"),
        ("piecewise_constant", {"starting_points": "5, 3", "factors": "1, 1"}, "must go up"),
    ],
)
def test_a_file_with_a_fault_is_one_line(curve_file, kind, values, said):
    with pytest.raises(UserError, match=said) as caught:
        read_curve_file(curve_file(kind, **values), STEPS, PEAK)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing.conf cannot be read"):
        read_curve_file(str(tmp_path / "nothing.conf"), STEPS, PEAK)
    (tmp_path / "odd.conf").write_text("type = linear_decay\n")
    with pytest.raises(UserError, match="odd.conf cannot be read"):
        read_curve_file(str(tmp_path / "odd.conf"), STEPS, PEAK)


def parse(*flags):
    return parse_pretraining_arguments([str(flag) for flag in flags])[2]


def test_the_exp_curve_falls_by_decay_rate_in_decay_step():
    args = parse(
        "--lr_schedule", "step", "--max_steps", 100, "--curve", "exp", "--decay_rate", 0.9, "--decay_step", 10
    )
    curve, options = chosen_curve(args, STEPS)
    for step in range(STEPS + 1):
        assert curve(step / STEPS, **options) == pytest.approx(0.9 ** (step / 10))
    args = parse("--total_training_time", 24, "--curve", "exp", "--decay_rate", 0.5)  # of 1000 hours
    curve, options = chosen_curve(args, 24 * 0.94)
    assert curve(1.0, **options) == pytest.approx(0.5 ** (24 * 0.94 / 1000))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--curve", "customized"], "--curve customized and --curve_conf_file belong together"),
        (["--curve_conf_file", "FILE"], "belong together"),
        (["--curve", "customized", "--curve_conf_file", "FILE", "--lr_power", 2], "contradicts the options"),
        (["--curve", "linear", "--decay_rate", 0.9], "--decay_rate has no effect on --lr_scheduler_type linear"),
        (["--curve", "exp", "--decay_step", 9, "--exponential_end_ratio", 0.1], "contradicts --exponential_end_ratio"),
        (["--curve", "exp", "--decay_step", 0], "--decay_step"),
    ],
)
def test_flags_that_do_not_fit_are_refused(curve_file, flags, said):
    path = curve_file("linear_decay", num_iter=94)
    with pytest.raises(UserError, match=said):
        parse("--max_steps", 100, *(path if flag == "FILE" else flag for flag in flags))


def test_a_file_needs_a_schedule_of_steps(curve_file):
    path = curve_file("linear_decay", num_iter=94)
    with pytest.raises(UserError, match="counts steps: give --lr_schedule step"):
        parse("--curve", "customized", "--curve_conf_file", path)


def test_a_run_follows_the_file_behind_the_warmup(harness, tiny_corpus, cache, out, curve_file):
    path = curve_file("elastic_step_decay", num_iter=18, interval_shrink_rate=1.5, cr_k=2)
    flags = ["--lr_schedule", "step", "--curve", "customized", "--curve_conf_file", path, "--warmup_proportion", 0.1]
    harness.run(*small_run(tiny_corpus, cache, out, *flags, "--lr", 1e-3, steps=20)).check()
    rates = {row["step"]: row["learning_rate"] for row in training_rows(out)}
    for step, rate in rates.items():
        t = step - 1 - 2  # updates behind the warm-up, before this one
        expected = (step - 1) / 2 if t < 0 else min(1.0, 0.75 ** (math.floor(math.log(18 / (18 - t), 1.5)) - 1))
        assert rate == pytest.approx(1e-3 * expected), step
