"""The report's pictures, as SVG: narrow enough for a phone, each with words that say what it shows."""

import base64
import io
from dataclasses import dataclass
from statistics import fmean

from common.progress import format_count

THIS, HELD_OUT, OTHER, PLAIN = "#1f5fa8", "#b3412e", "#8a5a00", "#666666"
POINTS = 200  # of a line; more would not be seen
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "frugal", "font.size": 12, "axes.titlesize": 12}


@dataclass(frozen=True)
class Picture:
    """An SVG as the address of an <img>. alt: what it shows, in words; caption: below it."""

    source: str
    alt: str
    caption: str


def loss_picture(run, other):
    """Loss against time, of a run and of one to compare with.

    Args:
        run: common.pipeline.report.Run with a pretraining; other: the same, or None.
    Returns:
        Picture.
    """
    unit, scale = time_unit(run)

    def draw(axis):
        if other and other.pretrained:
            _line(axis, other, "loss", scale, OTHER, f"{other.name}, training", linestyle="--")
        _line(axis, run, "loss", scale, THIS, "training (40 % masked)" if _masks(run) == 0.4 else "training")
        held_out = [row for row in run.metrics if row.get("eval_loss") is not None]
        axis.plot(
            [row["hours"] * scale for row in held_out],
            [row["eval_loss"] for row in held_out],
            "o-",
            color=HELD_OUT,
            markersize=4,
            label="held-out text (15 % masked)",
        )
        axis.axhline(run.results["unigram_loss"], color=PLAIN, linestyle=":", label="unigram baseline")
        axis.set(xlabel=f"training time ({unit})", ylabel="masked-token loss (nats)")
        axis.legend(frameon=False, fontsize=10)

    losses = [row["loss"] for row in run.metrics if row.get("loss") is not None]
    words = f"The training loss begins at {losses[0]:.2f} and ends at {losses[-1]:.2f}" if losses else "No step logged"
    words += (
        f"; on held-out text it ends at {run.results['eval_loss']:.2f}, the unigram baseline is at "
        f"{run.results['unigram_loss']:.2f}."
    )
    return _picture(draw, f"Line chart of the loss against training time. {words}", "Loss against training time")


def speed_picture(run, other):
    """Real tokens per second against time; as loss_picture."""
    unit, scale = time_unit(run)

    def draw(axis):
        if other and other.pretrained:
            _line(axis, other, "tokens_per_second", scale, OTHER, other.name, linestyle="--")
        _line(axis, run, "tokens_per_second", scale, THIS, "this run")
        axis.set(xlabel=f"training time ({unit})", ylabel="real tokens per second", ylim=(0, None))
        axis.yaxis.set_major_formatter(lambda value, _: format_count(value))
        if other and other.pretrained:
            axis.legend(frameon=False, fontsize=10)

    mean = run.results.get("tokens_per_second")
    words = f"{format_count(mean)} real tokens per second over the run." if mean else "No step was timed."
    return _picture(draw, f"Line chart of the training speed. {words}", "Throughput, padding not counted")


def rate_picture(run, other):
    """The learning rate against time; as loss_picture."""
    unit, scale = time_unit(run)

    def draw(axis):
        _line(axis, run, "learning_rate", scale, THIS, "this run", thin=False)
        axis.set(xlabel=f"training time ({unit})", ylabel="learning rate", ylim=(0, None))
        axis.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0), useMathText=True)

    rates = [row["learning_rate"] for row in run.metrics if row.get("learning_rate") is not None]
    words = f"Its highest value is {max(rates):.3g}." if rates else "No step logged."
    return _picture(draw, f"Line chart of the learning rate. {words}", "Learning rate")


def scores_picture(run, other):
    """Every seed's score of every task, medians, baselines; as loss_picture, of runs with scores."""
    rows = run.scores["tasks"]
    others = {row["task"]: row["median"] for row in other.scores["tasks"]} if other and other.scores else {}

    def draw(axis):
        labelled = set()

        def once(label):
            return None if label in labelled or labelled.add(label) else label

        for place, row in enumerate(rows):
            scores = list(row["scores"].values())
            spread = [place + 0.3 * (number / max(1, len(scores) - 1) - 0.5) for number in range(len(scores))]
            axis.plot(spread, [100 * score for score in scores], "o", color=THIS, label=once("a seed"))
            across = (place - 0.35, place + 0.35)
            lines = [(row["median"], THIS, "-", "median"), (row["baseline"]["score"], PLAIN, ":", "baseline")]
            lines += [(others.get(row["task"]), OTHER, "--", other.name)] if others else []
            for value, color, style, label in lines:
                if value is not None:
                    axis.plot(across, [100 * value] * 2, color=color, linestyle=style, linewidth=2, label=once(label))
        axis.set_xticks(range(len(rows)), [row["task"] for row in rows])
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.set_ylabel("score x 100")
        axis.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))

    medians = (f"{row['task']} {100 * row['median']:.1f}" for row in rows if row["median"] is not None)
    return _picture(
        draw, f"Dot plot of every seed's score. Medians: {', '.join(medians)}.", "Scores on validation rows"
    )


def time_unit(run):
    """("minutes", 60) for a run below an hour, else ("hours", 1)."""
    return ("minutes", 60) if max((row.get("hours", 0) for row in run.metrics), default=0) < 1 else ("hours", 1)


def _masks(run):
    return run.arguments["data"].get("mlm_probability")


def _line(axis, run, name, scale, color, label, thin=True, **style):
    rows = [row for row in run.metrics if row.get(name) is not None]
    size = -(-len(rows) // POINTS) if thin else 1
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    marker = "o" if len(groups) == 1 else ""
    axis.plot(
        [fmean(row["hours"] for row in group) * scale for group in groups],
        [fmean(row[name] for row in group) for group in groups],
        color=color,
        label=label,
        marker=marker,
        linewidth=1.5,
        **style,
    )


def _picture(draw, alt, caption):
    import matplotlib  # slow to import, needed once
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8, 3.6), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        axis.grid(color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return Picture("data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode(), alt, caption)
