"""One table of fine-tuning runs that differ in their seed, and perhaps in the weights they began with.

python -m common.seed_table runs/finetune-20261121-101500     its folders are <weights>-seed<N>
"""

import json
import statistics
import sys
from pathlib import Path

from common.errors import UserError, run_main
from common.run_folder import RESULTS


def read_runs(folder):
    """Results of the finished runs.

    Args:
        folder: Path.
    Returns:
        dict: weights -> seed -> content of all_results.json.
    Raises:
        UserError: there are none.
    """
    runs = {}
    for path in sorted(folder.glob(f"*-seed*/{RESULTS}")):
        weights, _, seed = path.parent.name.rpartition("-seed")
        runs.setdefault(weights, {})[int(seed)] = json.loads(path.read_text())
    if not runs:
        raise UserError(f"{folder}: holds no finished run; its folders should be <weights>-seed<N>")
    return runs


def make_table(runs):
    """Every metric by seed, with its median; of two kinds of weights also the difference, first minus second.

    Args:
        runs: as read_runs.
    Returns:
        list of rows, the header first; the last column of a difference is that of the medians.
    """
    seeds = sorted({seed for results in runs.values() for seed in results})
    first = next(iter(next(iter(runs.values())).values()))
    metrics = [
        name for name in first if name.startswith("eval_") and not name.startswith(("eval_loss", "eval_samples"))
    ]
    rows = [["metric", "weights", *(f"seed {seed}" for seed in seeds), "median"]]
    for metric in metrics:
        lines = {}
        for weights, results in runs.items():
            values = {seed: found[metric] for seed, found in results.items()}
            lines[weights] = values | {"median": statistics.median(values.values())}
        if len(lines) == 2:
            one, other = lines.values()
            lines["difference"] = {column: one[column] - other[column] for column in one if column in other}
        for name, values in lines.items():
            cells = (values.get(column) for column in (*seeds, "median"))
            sign = "+" if name == "difference" else ""
            rows.append([metric, name, *("-" if value is None else f"{value:{sign}.4f}" for value in cells)])
    return rows


def main():
    """Print the table of a folder."""
    if len(sys.argv) != 2:
        raise UserError("give one folder of runs")
    rows = make_table(read_runs(Path(sys.argv[1])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    run_main(main)
