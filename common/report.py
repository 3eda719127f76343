"""What a run leaves behind: metrics.jsonl, curves.png, all_results.json, a model card, and a summary on the screen."""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.models.presets import GENERATOR
from common.progress import format_count, format_duration

WIDTH = 96  # columns of the summary


@dataclass(frozen=True)
class ModelKind:
    """What a report says of one kind of language model and not of the other."""

    name: str
    task: str  # of transformers' pipeline, and on the hub
    predicted: str  # what the loss is the loss of
    judged: str
    folder: str = ""  # of the language model in that of the model

    def snippet(self, folder: Path | str) -> str:
        """Two lines of Python that load the model."""
        variable = self.task.replace("-", "_")
        call = f"pipeline({json.dumps(self.task)}, model={json.dumps(str(Path(folder) / self.folder))})"
        return f"from transformers import pipeline\n\n{variable} = {call}"


MASKED = ModelKind("masked language model", "fill-mask", "masked", "with 15 % of the tokens masked")
ELECTRA = replace(MASKED, name="discriminator (ELECTRA) with the generator that it judges", folder=GENERATOR)
CAUSAL = ModelKind("causal language model", "text-generation", "next", "each from those before it in its row")

COLORS = {"train": "#4c72b0", "eval": "#c44e52", "baseline": "#7f7f7f"}


class MetricsLog:
    """One JSON object per line. The file is opened for each line, so a kill loses at most the line being written.

    Args:
        path: the metrics.jsonl.
        is_main: False makes every method do nothing.
    """

    def __init__(self, path: Path, is_main: bool):
        self.path = Path(path)
        self.is_main = is_main

    def write(self, row: dict) -> None:
        """Append one row; NaN and infinity, which JSON does not have, become null."""
        if self.is_main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_json(row) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, which a resumed run writes again, and a line that was cut off."""
        if self.is_main and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row.get("step", step) <= step]
            _write_atomically(self.path, "".join(_json(row) + "\n" for row in kept).encode())


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, in order; none if there is no such file. A last line that was cut off is left out.

    Raises:
        UserError: a line before the last is not JSON.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut off, or is empty
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line or the file") from error
    return rows


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats; infinite where no float is as large, as in Hugging Face's run_clm."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def write_all_results(path: Path, results: dict) -> None:
    """Write a JSON object, whole or not at all; NaN and infinity become null."""
    _write_atomically(Path(path), (_json(results, indent=2) + "\n").encode())


def write_curves(
    metrics: list[dict], path_png: Path, title: str, baseline_loss: float | None = None, kind: ModelKind = MASKED
) -> None:
    """Draw loss against steps, tokens and time, the learning rate, and the speed.

    Args:
        metrics: rows of read_metrics; those with "loss" are training rows, those with "eval_loss" evaluations.
        path_png: where the picture goes; written whole or not at all.
        title: heading of the figure.
        baseline_loss: drawn as a dashed line, if given; kind: for the label of the losses.
    """
    from matplotlib.figure import Figure  # slow to import, needed once
    from matplotlib.ticker import EngFormatter, MaxNLocator

    train = [row for row in metrics if row.get("loss") is not None]
    evaluations = [row for row in metrics if row.get("eval_loss") is not None]
    in_minutes = max((row["hours"] for row in metrics if "hours" in row), default=0.0) < 1
    time_unit, time_scale = ("minutes", 60) if in_minutes else ("hours", 1)

    figure = Figure(figsize=(13, 7), dpi=120)  # margins by hand: to look for them takes as long as to draw
    figure.suptitle(title, fontsize=13, fontweight="bold")
    top, bottom = figure.subfigures(2, 1)
    margins = {"left": 0.06, "right": 0.985, "bottom": 0.15}
    loss_axes = top.subplots(1, 3, sharey=True, gridspec_kw=margins | {"top": 0.87, "wspace": 0.08})
    rate_axis, speed_axis = bottom.subplots(1, 2, gridspec_kw=margins | {"top": 0.95, "wspace": 0.12})

    def draw(axis, rows, x, y, x_scale=1, **style):
        rows = [row for row in rows if row.get(y) is not None and row.get(x) is not None]
        if not rows:
            return
        # One point has no line to be seen by, and evaluations are few: both get dots.
        marker = "o" if len(rows) == 1 or y == "eval_loss" else ""
        axis.plot([row[x] * x_scale for row in rows], [row[y] for row in rows], marker=marker, markersize=5, **style)

    time_label = f"time used ({time_unit})"
    x_axes = [("step", "optimizer steps", 1), ("tokens", "tokens", 1), ("hours", time_label, time_scale)]
    for axis, (x, label, scale) in zip(loss_axes, x_axes, strict=True):
        draw(axis, train, x, "loss", scale, color=COLORS["train"], linewidth=1.3, label="training")
        draw(axis, evaluations, x, "eval_loss", scale, color=COLORS["eval"], linewidth=1, label="held-out text")
        if baseline_loss is not None:
            axis.axhline(baseline_loss, color=COLORS["baseline"], linestyle="--", label="unigram baseline")
        axis.set_xlabel(label)
    loss_axes[0].set_ylabel(f"{kind.predicted}-token loss (nats)")
    if train or evaluations:
        loss_axes[2].legend(loc="upper right", frameon=True, framealpha=1, edgecolor="none")
    draw(rate_axis, train, "step", "learning_rate", color=COLORS["train"], linewidth=1.3)
    rate_axis.set(xlabel="optimizer steps", ylabel="learning rate", ylim=(0, None))
    rate_axis.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0), useMathText=True)
    draw(speed_axis, train, "hours", "tokens_per_second", time_scale, color=COLORS["train"], linewidth=1.3)
    speed_axis.set(xlabel=time_label, ylabel="real tokens per second", ylim=(0, None))
    speed_axis.yaxis.set_major_formatter(EngFormatter(sep=""))

    for axis in (*loss_axes, rate_axis, speed_axis):
        axis.grid(color="#e5e5e5", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.set_xlim(left=0)
        if not metrics:
            axis.set(xticks=[], yticks=[])
            axis.text(0.5, 0.5, "nothing logged", ha="center", color=COLORS["baseline"], transform=axis.transAxes)
    for axis in (loss_axes[0], loss_axes[1], rate_axis) if metrics else ():
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))

    save_figure(figure, path_png)


def save_figure(figure, path_png: Path) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display

    path_png = Path(path_png)
    temporary = path_png.with_name(path_png.name + ".tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path_png)


@dataclass
class FillMaskExample:
    """A sentence with one masked word, and what the model puts there."""

    text: str  # with the mask token in place
    target: str  # the word that was masked
    answers: Sequence[tuple[str, float]]  # (word, probability), the most probable first

    def __str__(self):
        answers = "   ".join(f"{' '.join(word.split())} {share:.0%}" for word, share in self.answers)
        return f"{_wrapped(self.text)}\n    -> {answers}   (was: {self.target})"


@dataclass
class Continuation:
    """The beginning of a held-out document, and how the model goes on."""

    text: str
    continuation: str

    def __str__(self):
        return f"{_wrapped(self.text)}\n{_wrapped('-> ' + self.continuation, '    ')}"


def write_model_card(
    path: Path,
    *,
    title: str,
    command: str,
    facts: dict[str, dict[str, str]],
    results: dict,
    examples: Sequence[FillMaskExample | Continuation],
    licence_note: str,
    tags: Sequence[str] = (),
    kind: ModelKind = MASKED,
) -> None:
    """Write the README.md of a saved language model, with the front matter the Hugging Face hub reads.

    Args:
        path: the README.md; curves.png is expected in the same folder.
        title: heading.
        command: the exact command line of the run.
        facts: one section each, e.g. {"Data": {"source": "..."}, "Budget": {...}, "Model": {...}}.
        results: eval_loss, eval_accuracy, unigram_loss, unigram_accuracy (see format_summary).
        examples: answers on held-out text.
        licence_note: what is known of the licence of text and weights.
        tags: for the hub, beside the kind's task; e.g. the model type. kind: of model.
    """
    tag_list = "\n".join(f"- {tag}" for tag in dict.fromkeys((kind.task, *tags)))
    sections = ""
    for heading, entries in facts.items():
        rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in entries.items())
        sections += f"\n## {heading}\n\n| | |\n|---|---|\n{rows}\n"
    table = "\n".join(f"| {name} | {model} | {baseline} |" for name, model, baseline in _results_table(results, kind))
    examples_text = textwrap.indent(_format_examples(examples), "    ")  # indented: code, so nothing needs escaping
    content = f"""---
library_name: transformers
pipeline_tag: {kind.task}
tags:
{tag_list}
---

# {title}

A {kind.name}, trained with this command:

```bash
{command}
```

## Results

On documents that were held out of training, {kind.judged}. The unigram baseline knows only how
often each token occurs in the training text, and is scored on the same tokens.

| | this model | unigram baseline |
|---|---|---|
{table}

![Loss, learning rate and speed of the run](curves.png)

Answers on held-out text:

{examples_text}

## Use

```python
{kind.snippet("path/to/this/folder")}
```
{sections}
## Licence

{licence_note}
"""
    _write_atomically(Path(path), content.encode())


def format_summary(
    results: dict,
    *,
    examples: Sequence[FillMaskExample | Continuation],
    files: dict[str, Path],
    model_folder: Path,
    mfu_formula: str,
    kind: ModelKind = MASKED,
) -> str:
    """The block shown at the end of a run.

    Args:
        results: as in all_results.json: eval_loss (nats), eval_accuracy, unigram_loss, unigram_accuracy (on the same
            tokens; accuracies in [0, 1]), train_steps, train_tokens, train_runtime (seconds of the budget used);
            where known also tokens_per_second, mfu (in [0, 1]), epoch and peak_memory_bytes.
        examples: answers on held-out text; may be empty.
        files: what lies where, e.g. {"curves": Path(...)}.
        model_folder: what from_pretrained loads.
        mfu_formula: how utilisation was computed, with the numbers, or why it is not known.
        kind: of model.
    """
    table = [f"  {name:<32}{model:>12}{baseline:>20}" for name, model, baseline in _results_table(results, kind)]
    trained = (
        f"{results['train_steps']:,} steps, {format_count(results['train_tokens'])} tokens "
        f"in {format_duration(results['train_runtime'])}"
    )
    if results.get("epoch") is not None:
        trained += f", {results['epoch']:.3g} epochs"
    speed = "not known: no step was timed"
    if results.get("tokens_per_second"):
        speed = f"{format_count(results['tokens_per_second'])} real tokens/s (padding not counted)"
    if results.get("peak_memory_bytes"):
        speed += f", peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB"
    mfu = results.get("mfu")
    utilisation = f"not known: {mfu_formula}" if mfu is None else f"{mfu:.1%} = {mfu_formula}"
    facts = {"trained": trained, "speed": speed, "utilisation": utilisation}
    lines = [
        f"{f'On held-out text, {kind.predicted} tokens':<34}{'this model':>12}{'unigram baseline':>20}",
        *table,
        "",
    ]
    lines += [_hanging(name, text) for name, text in facts.items()]
    if examples:
        lines += ["", "The model's answers on held-out text:", "", _format_examples(examples)]
    lines += ["", *(f"{name:<14}{path}" for name, path in files.items())]
    lines += ["", "To use it:", textwrap.indent(kind.snippet(model_folder), "    ")]
    rule = "-" * WIDTH
    return "\n".join([rule, *lines, rule])


def _results_table(results: dict, kind: ModelKind) -> list[tuple[str, str, str]]:
    losses, accuracies = ([results[f"{who}_{what}"] for who in ("eval", "unigram")] for what in ("loss", "accuracy"))
    table = [("loss (nats)", *(f"{loss:.3f}" for loss in losses)), ("accuracy", *(f"{a:.1%}" for a in accuracies))]
    if kind is CAUSAL:
        table.insert(1, ("perplexity", *(f"{perplexity(loss):,.2f}" for loss in losses)))
    if "eval_sentence_accuracy" in results:
        table.append(("accuracy on pairs of texts", f"{results['eval_sentence_accuracy']:.1%}", "50.0%"))
    if "eval_discriminator_accuracy" in results:
        table.append(("accuracy of the discriminator", f"{results['eval_discriminator_accuracy']:.1%}", ""))
    return table


def _format_examples(examples: Sequence[FillMaskExample | Continuation]) -> str:
    return "\n".join(map(str, examples))


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH - 4, initial_indent=indent, subsequent_indent=indent)


def _hanging(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{name:<14}", subsequent_indent=" " * 14)


def _cell(text: object) -> str:
    """Text for one cell of a markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _json(value: dict, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
