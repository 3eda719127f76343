"""The memory estimate against the peak of the process that trains: OPT shapes, random weights, AdamW, fp32, on a CPU.

    python -m benchmarks.bench_memory [--rounds 1] [--models 125m,350m]

Every case is a run of run_clm.py as its user starts it, three steps on random tokens. Writes
benchmarks/results/bench_memory.json and a table in benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys

from transformers import OPTConfig

from benchmarks.interleaved import Case, median, run_rounds, run_script, stock_environment
from benchmarks.results import write_results
from common.memory import GB, NAMES, Workload, estimate
from common.models.presets import opt_shape

SHAPES = ((4, 128, False), (4, 128, True), (8, 256, False), (8, 256, True))  # rows, their length, checkpointing
STEPS = 3  # the optimizer's state comes with the first


def main():
    """Run the cases that are asked for, or, as one of them, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--models", default="125m,350m", help="Names, separated by commas (default: %(default)s).")
    parser.add_argument("--measure", nargs=4, help="Internal: model, rows, length, whether with checkpointing.")
    args = parser.parse_args()
    if args.measure:
        size, rows, length, checkpointing = args.measure
        return print(json.dumps(measure(size, int(rows), int(length), checkpointing == "True")))
    cases = {}
    for size in args.models.split(","):
        for shape in SHAPES:
            words = [sys.executable, "-m", "benchmarks.bench_memory", "--measure", size, *shape]
            cases[case_name(size, *shape)] = Case(words, stock_environment())  # the script makes its own settings
    measured = run_rounds(cases, args.rounds)
    command = shlex.join(["python", "-m", "benchmarks.bench_memory", *sys.argv[1:]])
    write_results("bench_memory", command, [line_of(name, measured) for name in cases], measured)


def case_name(size, rows, length, checkpointing):
    """The name of a case in the table."""
    return f"opt-{size}, {rows} x {length}" + (", checkpointing" if checkpointing else "")


def measure(size, rows, length, checkpointing):
    """Run the script for a few steps.

    Returns:
        dict: bytes of every part of the estimate, the estimate that the script made, and the peak it measured.
    """
    flags = ["--model_size", size, "--synthetic_data", "--fp32", "--optimizer_type", "adamw"]
    flags += ["--per_device_train_batch_size", rows, "--per_device_eval_batch_size", rows, "--block_size", length]
    flags += ["--max_train_steps", STEPS, "--max_eval_samples", rows]
    results, _ = run_script("run_clm.py", [*flags, *(["--gradient_checkpointing"] if checkpointing else [])])
    parts = estimate(Workload(OPTConfig(**opt_shape(size)), rows, length, gradient_checkpointing=checkpointing))
    figures = {name: getattr(parts, name) for name in NAMES}
    figures |= {"total": results["estimated_memory_bytes"], "peak": results["peak_memory_bytes"]}
    return figures | {"libraries": figures["total"] - parts.total}


def line_of(name, measured):
    """A line of the table."""
    figures = {part: median(measured, name, part)[0] for part in (*NAMES, "total", "peak")}
    parts = {label: f"{figures[part] / GB:.2f}" for part, label in NAMES.items() if part not in ("update", "apart")}
    difference = f"{figures['total'] / figures['peak'] - 1:+.1%}"
    totals = {"estimate": f"{figures['total'] / GB:.2f}", "measured peak": f"{figures['peak'] / GB:.2f}"}
    return {"GB": name, **parts, **totals, "difference": difference}


if __name__ == "__main__":
    main()
