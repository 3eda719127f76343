"""What the runs of a sweep have scored: one table, as text, CSV and a picture.

Scores are fractions here and 100 times as much where a person reads them, as GLUE reports them.
"""

import csv
import io
import json
import math
import os
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from common.data.glue import TASKS
from common.glue.plan import Run
from common.report import WIDTH, write_all_results
from common.run_folder import RESULTS

FAILURE = "failure.json"  # in the folder of a run that ended without results
SELECTED, RUNS_CSV, TABLE_CSV, TABLE_TXT, PICTURE = (
    "selected.json",
    "runs.csv",
    "summary.csv",
    "summary.txt",
    "summary.png",
)
FINISHED, DEGENERATE, DIVERGED, FAILED, NOT_RUN = "finished", "degenerate", "diverged", "failed", "not run"
NOT_AVERAGED = ("wnli",)  # as in Devlin et al. 2019 and after it: its validation rows contradict its training rows
HOW_JUDGED = (
    "Diverged (nan): the loss or a weight was no longer a number; such a run has no score and counts as the worst "
    "where the configuration is chosen. Diverged (constant): on more than half of its metrics the run is not better "
    "than the most frequent label given to every row; its score counts like any other."
)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    status: FINISHED, DEGENERATE (no better than a constant answer), DIVERGED, FAILED or NOT_RUN. metrics: by name,
    None without a score; message: why it has none.
    """

    run: Run
    status: str
    metrics: dict[str, float] | None = None
    message: str = ""

    @property
    def score(self):
        """The task's score: the mean of its metrics; of MNLI, of both parts. None where there is none."""
        return None if self.metrics is None else fmean(self.metrics.values())


@dataclass(frozen=True)
class TaskSummary:
    """A task's row of the table.

    configuration: (learning rate, batch, epochs) of the best median; results: its runs. medians: by metric; score,
    deviation, best: median, sample standard deviation (None of one seed) and highest of the runs' scores.
    constant: the score of the constant answer. All None where no run has a score.
    """

    task: str
    configuration: tuple
    results: list[RunResult]
    medians: dict[str, float] | None
    score: float | None
    deviation: float | None
    best: RunResult | None
    constant: float | None

    @property
    def seeds(self):
        """How many runs have a score."""
        return sum(result.metrics is not None for result in self.results)

    def count(self, *statuses):
        """How many runs ended so."""
        return sum(result.status in statuses for result in self.results)


def metric_names(task):
    """The names of a task's metrics, given by name, in all_results.json without "eval_"."""
    task = TASKS[task]
    return [f"{metric}{suffix}" for suffix, _ in task.validation_files for metric in task.metrics]


def read_run(run, out, constants):
    """How a run ended, by what lies in its folder.

    Args:
        run: Run; out: Path of the sweep.
        constants: dict by task, where the constant answer's metrics are kept once they are known.
    Returns:
        RunResult.
    """
    folder = out / run.folder
    if (folder / RESULTS).exists():
        found = json.loads((folder / RESULTS).read_text())
        metrics = {name: found.get(f"eval_{name}") for name in metric_names(run.task)}
        if None in metrics.values():
            return RunResult(run, DIVERGED, message="a metric is not a number")
        if run.task not in constants:
            constants[run.task] = constant_metrics(run.task, _read_labels(run.task, folder))
        status = DEGENERATE if is_degenerate(metrics, constants[run.task]) else FINISHED
        return RunResult(run, status, metrics)
    if (folder / FAILURE).exists():
        failure = json.loads((folder / FAILURE).read_text())
        return RunResult(run, failure["status"], message=failure["message"])
    return RunResult(run, NOT_RUN)


def _read_labels(task, folder):
    """The labels of each validation split, as strings, by what is put behind a metric's name."""
    labels = {}
    for suffix, _ in TASKS[task].validation_files:
        with open(folder / f"eval_predictions{suffix}.tsv", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            labels[suffix] = [row["label"] for row in rows]
    return labels


def constant_metrics(task, labels):
    """The metrics of the answer that gives every row the split's most frequent label.

    Args:
        task: name; labels: dict by suffix of lists of strings.
    Returns:
        dict by metric's name. A constant correlates with nothing: 0 for the three correlations.
    """
    found = {}
    for suffix, values in labels.items():
        label, number = Counter(values).most_common(1)[0]
        share = number / len(values)
        positive = TASKS[task].labels is not None and label == TASKS[task].labels[-1]
        known = {"accuracy": share, "f1": 2 * share / (1 + share) if positive else 0.0}
        found |= {f"{metric}{suffix}": known.get(metric, 0.0) for metric in TASKS[task].metrics}
    return found


def is_degenerate(metrics, constant):
    """Whether a run is not better than the constant answer on more than half of its metrics.

    Source: a failed run of Mosbach et al. 2021 (arXiv:2006.04884), section 3, for several metrics.

    Args:
        metrics, constant: dicts with the same names.
    """
    worse = sum(metrics[name] <= constant[name] + 1e-9 for name in metrics)  # equal but for rounding is not better
    return worse > len(metrics) / 2


def choose_configuration(results):
    """The results of the configuration with the best median score; a diverged run counts as the worst.

    Args:
        results: RunResults of one task, at least one.
    Returns:
        list of RunResult; of equal configurations, the first one's.
    """
    groups = {}
    for result in results:
        groups.setdefault(result.run.configuration, []).append(result)

    def rank(group):
        scores = [-math.inf if result.score is None else result.score for result in group if _has_ended(result)]
        return median(scores) if scores else -math.inf, sum(result.score is not None for result in group)

    return max(groups.values(), key=rank)


def _has_ended(result):
    return result.metrics is not None or result.status == DIVERGED


def summarise(results, constants):
    """The rows of the table, in the order in which the tasks come.

    Args:
        results: RunResults; constants: dict by task of constant_metrics.
    Returns:
        list of TaskSummary.
    """
    return [
        _summarise_task(task, [result for result in results if result.run.task == task], constants.get(task))
        for task in dict.fromkeys(result.run.task for result in results)
    ]


def _summarise_task(task, results, constant):
    chosen = choose_configuration(results)
    scored = [result for result in chosen if result.score is not None]
    configuration = chosen[0].run.configuration
    if not scored:
        return TaskSummary(task, configuration, chosen, None, None, None, None, None)
    scores = [result.score for result in scored]
    return TaskSummary(
        task,
        configuration,
        chosen,
        {name: median(result.metrics[name] for result in scored) for name in scored[0].metrics},
        median(scores),
        stdev(scores) if len(scores) > 1 else None,
        max(scored, key=lambda result: result.score),
        fmean(constant.values()),
    )


def glue_average(scores):
    """GLUE's macro-average: the mean of the tasks' scores, each of which is the mean of its metrics, without WNLI.

    Source: Wang et al. 2019 (arXiv:1804.07461), section 4; without WNLI, Devlin et al. 2019, table 1.

    Args:
        scores: dict by task, None where there is none.
    Returns:
        (average, missing): None without any score; the names of the tasks that are missing from it.
    """
    counted = [task for task in TASKS if task not in NOT_AVERAGED]
    missing = [task for task in counted if scores.get(task) is None]
    found = [scores[task] for task in counted if task not in missing]
    return (fmean(found) if found else None), missing


def average_line(summaries):
    """The GLUE average in a sentence, with what is missing from it."""
    average, missing = glue_average({summary.task: summary.score for summary in summaries})
    counted = len(TASKS) - len(NOT_AVERAGED)
    if average is None:
        return f"GLUE average: none, as none of its {counted} tasks has a score."
    if not missing:
        return f"GLUE average: {100 * average:.2f} ({counted} tasks; WNLI is left out)"
    return (
        f"Mean over {counted - len(missing)} of GLUE's {counted} tasks: {100 * average:.2f}. Not the GLUE average: "
        f"{', '.join(missing)} missing."
    )


def format_table(title, summaries, results, absent):
    """The table as text.

    Args:
        title: str; summaries: list of TaskSummary; results: RunResults of all configurations.
        absent: names of tasks without data.
    """
    header = ("task", "metric", "median", "score", "sd", "seeds", "best", "constant", "diverged", "configuration")
    rows = [header, *(_cells(summary) for summary in summaries)]
    rows += [(task, "no data", *[""] * (len(header) - 2)) for task in absent]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    left = {0, 1, len(header) - 2, len(header) - 1}
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    notes = [average_line(summaries)]
    notes += [
        "x 100, on the validation split. score: median over the seeds of the mean of the task's metrics; sd and best: "
        "of that mean. constant: the score of the most frequent label. Of several configurations the one with the "
        f"best median is shown; {RUNS_CSV} has every run.",
        HOW_JUDGED,
    ]
    marked = [result for result in results if result.status not in (FINISHED, NOT_RUN)]
    notes += ["\n".join(f"{result.run.name}: {_reason(result)}" for result in marked)] if marked else []
    text = [textwrap.fill(note, WIDTH) if "\n" not in note else note for note in notes]
    rule = "-" * max(map(len, lines))
    return "\n".join([title, rule, *lines, rule, *text]) + "\n"


def _cells(summary):
    number = lambda value: "-" if value is None else f"{100 * value:.2f}"  # noqa: E731
    medians = "no score"
    if summary.medians:
        medians = "/".join(f"{100 * value:.1f}" for value in summary.medians.values())
    best = None if summary.best is None else summary.best.score
    planned = len(summary.results)
    return (
        summary.task + (" (not averaged)" if summary.task in NOT_AVERAGED else ""),
        "/".join(metric_names(summary.task)),
        medians,
        number(summary.score),
        number(summary.deviation),
        str(planned) if summary.seeds == planned else f"{summary.seeds} of {planned}",
        number(best),
        number(summary.constant),
        _marks(summary),
        _describe(summary.configuration),
    )


def _marks(summary):
    """What is wrong with a row's runs, in a few words."""
    named = {DIVERGED: "nan", DEGENERATE: "constant", FAILED: "failed", NOT_RUN: "not run"}
    counts = {status: summary.count(status) for status in named}
    return ", ".join(f"{number} {named[status]}" for status, number in counts.items() if number) or "0"


def _describe(configuration):
    rate, batch, epochs = configuration
    return f"lr {rate:g}, batch {batch}, {epochs:g} epochs"


def _reason(result):
    if result.status == DEGENERATE:
        return f"diverged: no better than a constant answer ({100 * result.score:.2f})"
    return result.status + (f": {result.message}" if result.message else "")


def write_summary(out, title, results, constants, absent):
    """Write runs.csv, summary.csv, summary.txt, summary.png and selected.json, each whole or not at all.

    Args:
        out: Path of the sweep; title: str; results: RunResults; constants: dict by task; absent: names of tasks.
    Returns:
        (list of TaskSummary, the table as text).
    """
    summaries = summarise(results, constants)
    shown = {result.run.folder for summary in summaries for result in summary.results}
    names = list(dict.fromkeys(name for task in TASKS for name in metric_names(task)))
    header = ["task", "learning_rate", "train_batch_size", "num_train_epochs", "seed", "status", "reported", "score"]
    rows = [
        {
            **dict(zip(header, (result.run.task, *result.run.configuration, result.run.seed), strict=False)),
            "status": result.status,
            "reported": int(result.run.folder in shown),
            "score": result.score,
            **(result.metrics or {}),
            "folder": result.run.folder,
            "message": result.message,
        }
        for result in results
    ]
    _write_csv(out / RUNS_CSV, [*header, *names, "folder", "message"], rows)
    average, missing = glue_average({summary.task: summary.score for summary in summaries})
    rows = [
        {
            "task": summary.task,
            **dict(zip(header[1:4], summary.configuration, strict=True)),
            "score": summary.score,
            "sd": summary.deviation,
            "seeds": summary.seeds,
            "best": summary.best and summary.best.score,
            "constant": summary.constant,
            "diverged": summary.count(DIVERGED, DEGENERATE),
            "failed": summary.count(FAILED),
            "not_run": summary.count(NOT_RUN),
            "in_average": int(summary.task not in NOT_AVERAGED and summary.score is not None),
            **(summary.medians or {}),
        }
        for summary in summaries
    ]
    rows.append({"task": "average", "score": average, "missing": " ".join(missing)})
    columns = ["sd", "seeds", "best", "constant", "diverged", "failed", "not_run", "in_average", *names, "missing"]
    _write_csv(out / TABLE_CSV, ["task", *header[1:4], "score", *columns], rows)
    text = format_table(title, summaries, results, absent)
    _replace(out / TABLE_TXT, text)
    write_picture(out / PICTURE, title, summaries)
    before = json.loads((out / SELECTED).read_text()) if (out / SELECTED).exists() else {}
    selected = {summary.task: summary.best.run.folder for summary in summaries if summary.best}
    write_all_results(out / SELECTED, before | selected)  # what earlier calls selected for other tasks stays
    return summaries, text


def write_picture(path, title, summaries):
    """Draw every seed's score, the medians, and the constant answers; written whole or not at all.

    Args:
        path: Path of a PNG; title: str; summaries: list of TaskSummary.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once, needs no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.5, 1.1 * len(summaries) + 2), 4.8), dpi=120, layout="constrained")
    axis = figure.subplots()
    labelled = set()

    def once(label):
        return None if label in labelled or labelled.add(label) else label

    styles = {FINISHED: ("o", "#4c72b0", "a seed"), DEGENERATE: ("X", "#c44e52", "a seed, no better than constant")}
    for place, summary in enumerate(summaries):
        if summary.score is None:
            axis.text(place, 0.5, "no score", ha="center", color="#7f7f7f", transform=axis.get_xaxis_transform())
            continue
        scored = [result for result in summary.results if result.score is not None]
        for number, result in enumerate(scored):
            marker, color, label = styles[result.status]
            shift = 0.25 * (number / (len(scored) - 1) - 0.5) if len(scored) > 1 else 0.0
            axis.plot(
                place + shift, 100 * result.score, marker, color=color, alpha=0.8, label=once(label), linestyle=""
            )
        across = (place - 0.3, place + 0.3)
        axis.plot(across, [100 * summary.score] * 2, color="#222222", linewidth=1.8, label=once("median"))
        constant = once("constant answer")
        axis.plot(across, [100 * summary.constant] * 2, color="#7f7f7f", linestyle="--", label=constant)
    for place, summary in enumerate(summaries):
        if nan := summary.count(DIVERGED):
            axis.text(place, 0.02, f"{nan} nan", ha="center", color="#c44e52", transform=axis.get_xaxis_transform())
    names = (
        f"{summary.task}\n(not averaged)" if summary.task in NOT_AVERAGED else summary.task for summary in summaries
    )
    axis.set_xticks(range(len(summaries)), list(names))
    axis.set_xlim(-0.6, len(summaries) - 0.4)
    axis.set_ylabel("score x 100 (mean of the task's metrics)")
    figure.suptitle("\n".join(textwrap.wrap(title, 80)), fontsize=11, fontweight="bold")
    columns = 12 * len(summaries) + 20  # that fit above the axes
    axis.set_title("\n".join(textwrap.wrap(average_line(summaries), columns)), fontsize=9)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    if labelled:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    temporary = path.with_name(path.name + ".tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)


def _write_csv(path, columns, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(path, file.getvalue())


def _replace(path, text):
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
