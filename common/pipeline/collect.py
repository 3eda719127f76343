"""What fine-tuning has scored, as one JSON file and one table: of a sweep over GLUE, or of the task without data.

python -m common.pipeline.collect runs/quick/finetune runs/quick/results.json
"""

import csv
import sys
from pathlib import Path
from statistics import median, stdev

from common.errors import UserError, run_main
from common.glue.summary import DIVERGED, FAILED, RUNS_CSV, TABLE_CSV, glue_average, metric_names
from common.pipeline.config import FOLLOWS
from common.report import write_all_results
from common.seed_table import read_runs

RANDOM, PRETRAINED = "random", "pretrained"  # folders of run_finetune_glue.sh begin with one of them
METRIC = "accuracy"  # of that task, whose two labels are equally frequent


def collect(folder):
    """The scores of a folder of fine-tuning runs.

    Args:
        folder: Path, of run_glue_all.sh or of run_finetune_glue.sh.
    Returns:
        dict: tasks, a list of dicts as task_row makes them; average (None where there is none) and missing, of GLUE.
    Raises:
        UserError: it holds no finished run.
    """
    if (folder / RUNS_CSV).exists():
        return _of_sweep(folder)
    return {"tasks": [_of_seeds(read_runs(folder))], "average": None, "missing": []}


def task_row(task, metrics, seeds, configuration, baseline, ended_badly=0):
    """A task's scores.

    Args:
        task: name; metrics: names; seeds: {seed: {metric: value}}; configuration: str.
        baseline: (what it is, its score); ended_badly: runs without a score.
    Returns:
        dict: what was given, with scores, {seed: mean of the metrics}, their median, and sd, their sample standard
        deviation (None of one seed).
    """
    scores = {seed: sum(values[name] for name in metrics) / len(metrics) for seed, values in seeds.items()}
    values = list(scores.values())
    return {
        "task": task,
        "metrics": metrics,
        "seeds": {str(seed): found for seed, found in seeds.items()},
        "scores": {str(seed): score for seed, score in scores.items()},
        "median": median(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "configuration": configuration,
        "baseline": {"name": baseline[0], "score": baseline[1]},
        "ended_badly": ended_badly,
    }


def _of_sweep(folder):
    with open(folder / RUNS_CSV, encoding="utf-8", newline="") as file:
        runs = [row for row in csv.DictReader(file) if row["reported"] == "1"]
    with open(folder / TABLE_CSV, encoding="utf-8", newline="") as file:
        constants = {row["task"]: row["constant"] for row in csv.DictReader(file)}
    rows = []
    for task in dict.fromkeys(row["task"] for row in runs):
        own = [row for row in runs if row["task"] == task]
        names = metric_names(task)
        seeds = {int(row["seed"]): {name: float(row[name]) for name in names} for row in own if row["score"]}
        configuration = "learning rate {learning_rate}, batch {train_batch_size}, {num_train_epochs} epochs."
        constant = float(constants[task]) if constants[task] else None
        bad = sum(row["status"] in (DIVERGED, FAILED) for row in own)
        rows.append(
            task_row(task, names, seeds, configuration.format(**own[0]), ("the most frequent label", constant), bad)
        )
    average, missing = glue_average({row["task"]: row["median"] for row in rows})
    return {"tasks": rows, "average": average, "missing": missing}


def _of_seeds(runs):
    if not runs.get(PRETRAINED):
        raise UserError(f"no run from pretrained weights has finished (there are: {', '.join(runs)}); run finetune")

    def seeds(weights):
        results = runs.get(weights, {})
        return {seed: {METRIC: one[f"eval_{METRIC}"]} for seed, one in sorted(results.items())}

    random = task_row("", [METRIC], seeds(RANDOM), "", ("", None))
    baseline = ("the same from random weights", random["median"])
    configuration = "does a sentence follow another one in the documentation of the installed packages?"
    row = task_row(FOLLOWS, [METRIC], seeds(PRETRAINED), configuration, baseline)
    return row | {"baseline": row["baseline"] | {"scores": random["scores"]}}


def main():
    """Collect, write and print."""
    if len(sys.argv) != 3:
        raise UserError("give the folder of the runs and the file to write")
    folder, path = map(Path, sys.argv[1:])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run finetune first")
    results = collect(folder)
    write_all_results(path, results)
    print(f"{'task':<10}{'metric':<28}{'median':>8}{'sd':>8}{'seeds':>7}{'baseline':>10}")
    for row in results["tasks"]:
        shown = (_percent(row["median"]), _percent(row["sd"]))
        baseline = _percent(row["baseline"]["score"])
        metrics = "/".join(row["metrics"])
        print(f"{row['task']:<10}{metrics:<28}{shown[0]:>8}{shown[1]:>8}{len(row['scores']):>7}{baseline:>10}")


def _percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    run_main(main)
