"""The fine-tuning step of run_glue.py against that of Hugging Face's GLUE example, on MRPC.

    python -m benchmarks.bench_glue [--rounds 5] [--rows mini,base]

Ours is what `python run_glue.py` runs with its defaults, at the same batch; the example is benchmarks/glue_example.py,
padded to 128 positions, once in a stock environment, as its user runs it, and once in ours. Writes
benchmarks/results/bench_glue.json and a table in benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass

from transformers import BertConfig

from benchmarks.bench_pretraining import CACHE, DATA
from benchmarks.interleaved import Case, median, ratio, run_rounds, run_script, stock_environment
from benchmarks.results import spread, write_results
from common.data.examples import encode_examples
from common.data.glue import TASKS, read_task_file
from common.data.tokenizers import load_tokenizer
from common.memory_settings import SETTINGS
from common.models.presets import model_shape

MRPC = DATA / "glue" / "MRPC"
VOCABULARY = DATA / "vocab" / "bert-base-uncased" / "vocab.txt"
LENGTH, BATCH = 128, 32


@dataclass(frozen=True)
class Row:
    """A model: its preset, its dropout, and how many steps of the example and of ours are measured."""

    model: str
    dropout: float = 0.1
    steps: int = 4
    our_steps: int = 115  # an epoch of MRPC, so that rows of every length are among them


ROWS = {
    "mini": Row("mini"),
    "mini-0": Row("mini", dropout=0.0),  # as run_pretraining.py makes its checkpoints by default
    "base": Row("base", steps=1, our_steps=8),
}
AGAINST = {
    "example, stock": "--pad_to_max_length, as its user runs it",
    "example, tuned": "--pad_to_max_length, in our environment",
    "example, longest": "padded to a batch's longest row, as its user runs it",
}


def main():
    """Run the rows that are asked for, or, as a case of one of them, measure a run of ours."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default=",".join(ROWS), help="Names, separated by commas (default: all).")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, help="Internal: flags of run_glue.py to measure.")
    args = parser.parse_args()
    if args.ours:
        return measure_ours(args.ours)
    if not MRPC.is_dir():
        sys.exit(f"error: no folder {MRPC}: set FRUGAL_TEST_DATA to a folder with glue/MRPC and vocab")
    table, details = [], []
    for name in args.rows.split(","):
        row = ROWS[name]
        measured = run_rounds(cases_of(row), args.rounds)
        table += lines_of(row, measured)
        details += [{"row": name, **figures} for figures in measured]
        command = shlex.join(["python", "-m", "benchmarks.bench_glue", *sys.argv[1:]])
        write_results("bench_glue", command, table, details)


def cases_of(row):
    """The processes to compare for a row, by name."""
    folder = CACHE / f"classifier-{row.model}-{row.dropout}"
    dropout = {"hidden_dropout_prob": row.dropout, "attention_probs_dropout_prob": row.dropout}
    vocab_size = len(load_tokenizer(str(VOCABULARY)))
    BertConfig(vocab_size=vocab_size, **model_shape(row.model), **dropout).save_pretrained(folder)
    shared = ["--tokenizer_name", VOCABULARY, "--task_name", "mrpc", "--data_dir", MRPC, "--max_length", LENGTH]
    shared += ["--per_device_train_batch_size", BATCH]
    example = [sys.executable, "-m", "benchmarks.glue_example", "--model", folder, *shared, "--steps", row.steps]
    ours = [sys.executable, "-m", "benchmarks.bench_glue", "--ours", "--model_name_or_path", folder, *shared]
    ours += ["--random_weights", "--do_train", "--max_train_steps", row.our_steps]
    return {
        "ours": Case(ours, stock_environment()),  # it restarts itself with its settings
        "example, stock": Case([*example, "--pad_to_max_length"], stock_environment()),
        "example, tuned": Case([*example, "--pad_to_max_length"], SETTINGS),
        "example, longest": Case(example, stock_environment()),
    }


def measure_ours(flags):
    """Run run_glue.py and print the figures of its steps."""
    results, _ = run_script("run_glue.py", flags)
    examples = read_task_file(TASKS["mrpc"], MRPC / "train.tsv", labelled=True)
    encoded = encode_examples(examples, TASKS["mrpc"], load_tokenizer(str(VOCABULARY)), LENGTH, False)
    speed = results["tokens_per_second"]
    figures = {"tokens_per_second": speed, "examples_per_second": speed / encoded.lengths.mean()}
    print(json.dumps(figures | {"peak_memory_bytes": results["peak_memory_bytes"]}))


def lines_of(row, measured):
    """Lines of the table for a row."""
    return [
        {
            "model": f"bert-{row.model}, dropout {row.dropout:g}",
            "the example": note,
            "its examples/s": spread(median(measured, name, "examples_per_second")),
            "ours, examples/s": spread(median(measured, "ours", "examples_per_second")),
            "its tokens/s": spread(median(measured, name, "tokens_per_second")),
            "ours, tokens/s": spread(median(measured, "ours", "tokens_per_second")),
            "ratio of tokens/s": spread(ratio(measured, "ours", name, "tokens_per_second")),
        }
        for name, note in AGAINST.items()
    ]


if __name__ == "__main__":
    main()
