"""The training step of run_pretraining.py against that of Hugging Face's masked-LM example.

    python -m benchmarks.bench_pretraining [--rounds 5] [--rows mini-128,lines]

Ours is what `python run_pretraining.py` runs with its defaults; the example is benchmarks/masked_lm_example.py, once
in a stock environment, as its user runs it, and once in ours. Writes benchmarks/results/bench_pretraining.json and a
table in benchmarks/README.md.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.interleaved import REPOSITORY, Case, median, ratio, run_rounds, run_script, stock_environment
from benchmarks.results import spread, write_results
from common.memory_settings import SETTINGS

DATA = Path(os.environ.get("FRUGAL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
CACHE = REPOSITORY / "runs" / "cache" / "benchmarks"
ABLATION = {  # what the example becomes, one change after another, before it is ours
    "+ masked positions only in the head": ["--masked_head"],
    "+ dropout 0": ["--no_dropout"],
    "+ fused AdamW": ["--fused_adamw"],
}
EQUAL_WORK = ["--optimizer_type", "adamw", "--mlm_probability", 0.15]  # the example's; the rest are our defaults
BF16 = {"+ bf16": ["--bf16"]}


@dataclass(frozen=True)
class Row:
    """A line of the table: a model on rows of a length, by micro-batches of `batch` rows."""

    model: str
    length: int
    batch: int = 32
    lines: bool = False  # one sentence per line, in place of one stream
    steps: int = 3
    warm_up: int = 2  # in the first two, what a step holds is faulted in: with bert-base they take twice the time
    ablation: bool = False
    recipe: bool = False  # also with our own masking rate and rows


CPU_ROWS = {
    "mini-128": Row("mini", 128, recipe=True),
    "mini-512": Row("mini", 512, batch=8),
    "small-128": Row("small", 128, steps=2),
    "base-128": Row("base", 128, steps=1),
    "lines": Row("mini", 128, lines=True),
    "ablation": Row("mini", 128, ablation=True),
}
GPU_ROWS = {
    "base-128": Row("base", 128, batch=256, steps=20, warm_up=10),
    "base-512": Row("base", 512, batch=64, steps=20, warm_up=10),
    "large-128": Row("large", 128, batch=128, steps=20, warm_up=10),
    "lines": Row("base", 128, batch=256, lines=True, steps=20, warm_up=10),
}
ROWS = GPU_ROWS if torch.cuda.is_available() else CPU_ROWS


def main():
    """Run the rows that are asked for, or, as a case of one of them, measure a run of ours."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default=",".join(ROWS), help="Names, separated by commas (default: all).")
    parser.add_argument("--warm_up", type=int, help="Internal: steps of it that do not count.")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, help="Internal: flags of run_pretraining.py to measure.")
    args = parser.parse_args()
    if args.ours:
        return measure_ours(args.ours, args.warm_up)
    if not DATA.is_dir():
        sys.exit(f"error: no folder {DATA}: set FRUGAL_TEST_DATA to a folder with wikitext-2 and vocab")
    table, details = [], []
    for name in args.rows.split(","):
        row = ROWS[name]
        cases = cases_of(row)
        measured = run_rounds(cases, args.rounds)
        table += (ablation_lines if row.ablation else lines_of)(row, measured)
        details += [{"row": name, **figures} for figures in measured]
        command = shlex.join(["python", "-m", "benchmarks.bench_pretraining", *sys.argv[1:]])
        write_results("bench_pretraining", command, table, details)


def cases_of(row):
    """The processes to compare for a row, by name."""
    stock, tuned = stock_environment(), SETTINGS
    CACHE.mkdir(parents=True, exist_ok=True)
    text = sentences() if row.lines else DATA / "wikitext-2" / "train.txt"
    vocabulary = DATA / "vocab" / "bert-base-uncased" / "vocab.txt"
    shared = ["--train_file", text, "--tokenizer_name", vocabulary, "--model_size", row.model]
    shared += ["--max_seq_length", row.length]
    example = [sys.executable, "-m", "benchmarks.masked_lm_example", *shared, "--cache_dir", CACHE / "datasets"]
    example += ["--per_device_train_batch_size", row.batch, "--steps", row.steps, "--warm_up", row.warm_up]
    ours = [sys.executable, "-m", "benchmarks.bench_pretraining", "--warm_up", row.warm_up, "--ours", *shared]
    ours += ["--cache_dir", CACHE, "--train_batch_size", row.batch, "--per_device_train_batch_size", row.batch]
    ours += ["--max_train_steps", row.warm_up + row.steps, "--logging_steps", 1, "--max_eval_samples", 1]
    equal = [*ours, *EQUAL_WORK, *([] if row.lines else ["--packing", "concat"])]
    cases = {"ours": Case(equal, stock)}  # it restarts itself with its settings
    if row.recipe:
        cases["our recipe"] = Case(ours, stock)
    if row.lines:
        lines = [*example, "--line_by_line"]
        cases["example, stock"] = Case([*lines, "--pad_to_max_length"], stock)
        cases["example, longest"] = Case(lines, stock)
        return cases
    cases |= {"example, stock": Case(example, stock), "example, tuned": Case(example, tuned)}
    if row.ablation:
        flags = []
        for name, more in (ABLATION | (BF16 if "bf16" in Path("/proc/cpuinfo").read_text() else {})).items():
            flags = [*flags, *more]
            cases[name] = Case([*example, *flags], tuned)
    return cases


def measure_ours(flags, warm_up):
    """Run run_pretraining.py and print the figures of its steps after the first `warm_up`."""
    results, rows = run_script("run_pretraining.py", flags)
    rows = [row for row in rows if "loss" in row][warm_up:]
    # utilisation as the run reports it, for the median step instead of the mean
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    figures = {
        "tokens_per_second": speed,
        "mfu": results["mfu"] * speed / results["tokens_per_second"],
        "data_wait_share": statistics.median(row["data_wait_share"] for row in rows),
        "peak_memory_bytes": results["peak_memory_bytes"],
    }
    print(json.dumps(figures))


def lines_of(row, measured):
    """Lines of the table for a row."""
    what = "one sentence per line" if row.lines else f"S={row.length}, B={row.batch}"
    against = {"example, stock": "as its user runs it", "example, tuned": "in our environment"}
    if row.lines:
        against = {"example, stock": "--line_by_line --pad_to_max_length", "example, longest": "--line_by_line"}
    pairs = [("ours", name, note) for name, note in against.items()]
    if row.recipe:
        pairs.append(
            ("our recipe", "example, stock", "as its user runs it; ours with its own masking rate and packing")
        )
    return [
        {
            "model": f"bert-{row.model}",
            "text": what,
            "the example": note,
            "its tokens/s": spread(median(measured, name, "tokens_per_second")),
            "ours, tokens/s": spread(median(measured, ours, "tokens_per_second")),
            "ratio": spread(ratio(measured, ours, name, "tokens_per_second")),
            "our utilisation": f"{median(measured, ours, 'mfu')[0]:.0%}",
        }
        for ours, name, note in pairs
    ]


def ablation_lines(row, measured):
    """Lines of the table for the ablation: ratios to the example in our environment."""
    names = [name for name in measured[0] if name not in ("load", "ours", "example, stock")]
    return [
        {
            "model": f"bert-{row.model}",
            "text": f"S={row.length}, B={row.batch}",
            "the example": f"ablation: {name}",
            "its tokens/s": spread(median(measured, name, "tokens_per_second")),
            "ours, tokens/s": "",
            "ratio": spread(ratio(measured, name, "example, tuned", "tokens_per_second")) + " of the example in it",
            "our utilisation": "",
        }
        for name in [*names, "ours"]
    ]


def sentences():
    """WikiText-2 cut at its full stops, one sentence a line. Returns: Path of the file."""
    path = CACHE / "sentences.txt"
    text = (DATA / "wikitext-2" / "train.txt").read_text(encoding="utf-8")
    lines = [part.strip() for line in text.splitlines() for part in line.replace(" . ", " .\n").split("\n")]
    path.write_text("".join(f"{line}\n" for line in lines if line), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
