"""The training step of run_clm.py against that of Hugging Face's causal-LM example, at OPT-125m's shape.

    python -m benchmarks.bench_clm [--rounds 5] [--rows 125m-128,125m-512,125m-1024]

Ours is what `python run_clm.py --throughput_steps N` runs with its defaults, at the same row length; the example is
benchmarks/clm_example.py, once in a stock environment, as its user runs it, and once in ours. Writes
benchmarks/results/bench_clm.json and a table in benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass

import torch

from benchmarks.bench_pretraining import CACHE, DATA
from benchmarks.interleaved import Case, median, ratio, run_rounds, run_script, stock_environment
from benchmarks.results import spread, write_results
from common.memory_settings import SETTINGS

TEXT, VOCABULARY = DATA / "wikitext-2" / "train.txt", DATA / "vocab" / "opt"
BATCH = 8  # both scripts' default
AGAINST = {"example, stock": "as its user runs it", "example, tuned": "in our environment"}


@dataclass(frozen=True)
class Row:
    """A line of the table: a published OPT shape on rows of a length, and the steps that are timed."""

    model: str
    length: int
    steps: int = 1
    warm_up: int = 1  # of the example; ours has its own


CPU_ROWS = {
    "125m-128": Row("125m", 128, steps=3),
    "125m-512": Row("125m", 512),
    "125m-1024": Row("125m", 1024),  # the example's own default
}
GPU_ROWS = {"125m-1024": Row("125m", 1024, steps=20, warm_up=10)}
ROWS = GPU_ROWS if torch.cuda.is_available() else CPU_ROWS


def main():
    """Run the rows that are asked for, or, as a case of one of them, measure a run of ours."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default=",".join(ROWS), help="Names, separated by commas (default: all).")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, help="Internal: flags of run_clm.py to measure.")
    args = parser.parse_args()
    if args.ours:
        results, _ = run_script("run_clm.py", args.ours)
        return print(json.dumps(results))
    if not VOCABULARY.is_dir():
        sys.exit(f"error: no folder {VOCABULARY}: set FRUGAL_TEST_DATA to a folder with wikitext-2 and vocab/opt")
    table, details = [], []
    for name in args.rows.split(","):
        measured = run_rounds(cases_of(ROWS[name]), args.rounds)
        table += lines_of(ROWS[name], measured)
        details += [{"row": name, **figures} for figures in measured]
        command = shlex.join(["python", "-m", "benchmarks.bench_clm", *sys.argv[1:]])
        write_results("bench_clm", command, table, details)


def cases_of(row):
    """The processes to compare for a row, by name."""
    shared = ["--train_file", TEXT, "--tokenizer_name", VOCABULARY, "--model_size", row.model]
    shared += ["--block_size", row.length, "--per_device_train_batch_size", BATCH]
    example = [sys.executable, "-m", "benchmarks.clm_example", *shared, "--cache_dir", CACHE / "datasets"]
    example += ["--steps", row.steps, "--warm_up", row.warm_up]
    ours = [sys.executable, "-m", "benchmarks.bench_clm", "--ours", *shared, "--cache_dir", CACHE]
    ours += ["--throughput_steps", row.steps]
    return {
        "ours": Case(ours, stock_environment()),  # it restarts itself with its settings
        "example, stock": Case(example, stock_environment()),
        "example, tuned": Case(example, SETTINGS),
    }


def lines_of(row, measured):
    """Lines of the table for a row."""
    return [
        {
            "model": f"opt-{row.model}",
            "text": f"S={row.length}, B={BATCH}",
            "the example": note,
            "its tokens/s": spread(median(measured, name, "tokens_per_second")),
            "ours, tokens/s": spread(median(measured, "ours", "tokens_per_second")),
            "ratio": spread(ratio(measured, "ours", name, "tokens_per_second")),
            "our utilisation": f"{median(measured, 'ours', 'mfu')[0]:.0%}",
        }
        for name, note in AGAINST.items()
    ]


if __name__ == "__main__":
    main()
