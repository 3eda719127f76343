"""A validation split at a glance: a confusion matrix of a classification, a scatter plot of a regression.

n examples, C classes (1 for a score).
"""

import numpy as np

from common.predictions import decide
from common.report import COLORS, save_figure

MOST_CLASSES_WITH_NUMBERS = 12  # more do not fit into their cells


def write_eval_plot(path, task, outputs, labels, title, scores):
    """Draw how predictions and labels agree.

    Args:
        path: the png, written whole or not at all; task: common.data.glue.Task.
        outputs: [n, C] float32; labels: [n] class numbers, or scores.
        title: heading of the figure; scores: a line below it.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6.5, 5.5), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axis = figure.subplots()
    axis.set_title(scores, fontsize=10)
    draw = _scatter if task.labels is None else _confusion
    draw(axis, task, decide(task, outputs), labels)
    save_figure(figure, path)


def confusion(predictions, labels, classes):
    """[C, C] int64: how many examples of each label (row) got each prediction (column).

    Args:
        predictions, labels: [n] int64 in [0, C); classes: C.
    """
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def _confusion(axis, task, predictions, labels):
    counts = confusion(predictions, labels, task.num_labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.figure.colorbar(image, ax=axis, label="share of the label's examples", shrink=0.8)
    ticks = range(task.num_labels)
    axis.set(xlabel="prediction", ylabel="label", xticks=ticks, yticks=ticks)
    slant = {"rotation": 45, "ha": "right"} if sum(map(len, task.labels)) > 40 else {}
    axis.set_xticklabels(task.labels, **slant)
    axis.set_yticklabels(task.labels)
    axis.spines[:].set_visible(False)
    if task.num_labels <= MOST_CLASSES_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            text = f"{count:,}\n{shares[row, column]:.0%}"
            axis.text(column, row, text, ha="center", va="center", color=color)


def _scatter(axis, task, predictions, labels):
    ends = [labels.min(), labels.max()]
    axis.plot(ends, ends, color=COLORS["baseline"], linestyle="--", linewidth=1, label="prediction = label")
    axis.scatter(labels, predictions, s=12, alpha=0.4, color=COLORS["train"], linewidths=0)
    axis.set(xlabel="label", ylabel="prediction")
    axis.legend(loc="upper left", frameon=False)
    axis.grid(color="#e5e5e5", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
