"""Wall time to the loss that Hugging Face's masked-LM example has after an epoch of WikiText-2, bert-mini.

    python -m benchmarks.bench_time_to_loss

The loss to reach is the example's after one epoch, with its default learning rate and with the best of five. Ours is
run_pretraining.py with its own defaults, for a budget of tokens chosen beforehand, at whose end its schedule ends; a
row counts only where it is not above the loss to reach. Both are judged by stock BertForMaskedLM on the same masked
held-out rows, and both times are of training alone, without imports, data preparation and this judgement.

The example is slow, so its loss comes from example_epoch.py's arithmetically equal way to compute its steps (checked
here over 20 steps without dropout), and its time is its number of steps times the time of its true step, measured in
turn with ours, each in a fresh process, round after round. --baseline_in_full instead runs its epochs as they are.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from transformers import BertForMaskedLM

from benchmarks import example_epoch
from benchmarks.interleaved import REPOSITORY, Case, run_rounds, stock_environment
from benchmarks.results import spread, write_results
from benchmarks.search_defaults import wikitext_flags
from common.arguments import parse_pretraining_arguments

DEFAULT_RATE = 5e-5
RATES = (DEFAULT_RATE, 1e-4, 3e-4, 1e-3, 3e-3)
BUDGETS = {"default": 80_000, "best": 325_000}  # tokens that suffice, by search
CHECKED_STEPS, TOLERANCE = 20, 1e-4


def run_ours(args):
    """Run run_pretraining.py with its defaults and judge what it saved. Returns: figures."""
    out = args.work / f"ours-{args.ours}"
    flags = [*wikitext_flags(args.data, args.work / "cache"), "--output_dir", str(out), "--overwrite_output_dir"]
    flags += ["--model_size", "mini", *shlex.split(args.flags)]
    _, data_args, training_args, _ = parse_pretraining_arguments(flags)
    steps = -(-args.ours // (training_args.train_batch_size * data_args.max_seq_length))
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, REPOSITORY / "run_pretraining.py", *flags, "--max_train_steps", str(steps)],
        check=True,
        stdout=sys.stderr,
    )
    process_seconds = time.perf_counter() - began
    results = json.loads((out / "all_results.json").read_text())
    evaluation = example_epoch.Evaluation(args.data, example_epoch.load_tokenizer(args.data))
    return {
        "seconds": results["train_runtime"],
        "process_seconds": process_seconds,
        "tokens": results["train_tokens"],
        "eval_loss": evaluation(BertForMaskedLM.from_pretrained(out)),
    }


def example_files(args):
    """Flags of masked_lm_example.py for WikiText-2; its batch, length and model are those of example_epoch.py."""
    text, vocabulary = Path(args.data) / "wikitext-2/train.txt", Path(args.data) / "vocab/bert-base-uncased/vocab.txt"
    return ["--train_file", text, "--tokenizer_name", vocabulary, "--cache_dir", args.work / "datasets"]


def example_losses(args):
    """Held-out loss of the example after one epoch, by learning rate, kept in --work as it is found."""
    kept = args.work / ("example_in_full.json" if args.baseline_in_full else "example.json")
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for rate in args.rates:
        if f"{rate:g}" in found:
            continue
        command = [sys.executable, "-m", "benchmarks.example_epoch", "--learning_rate", f"{rate:g}"]
        command += ["--data", args.data, "--work", args.work / ("in_full" if args.baseline_in_full else "example")]
        command += ["--in_full"] if args.baseline_in_full else []
        done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, check=True, capture_output=True, text=True)
        found[f"{rate:g}"] = json.loads(done.stdout.strip().rpartition("\n")[2])
        kept.write_text(json.dumps(found, indent=1))
    return {float(rate): figures for rate, figures in found.items() if float(rate) in args.rates}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=example_epoch.DATA, help="folder that holds wikitext-2 and vocab")
    parser.add_argument("--work", type=Path, default=example_epoch.WORK, help="folder for what is prepared and run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the example")
    parser.add_argument("--baseline_in_full", action="store_true", help="run the example's epochs as they are")
    parser.add_argument("--ours", type=int, metavar="TOKENS", help="run ours alone, once, and print its figures")
    parser.add_argument("--flags", default="", help="more flags of run_pretraining.py, as one word, with --ours")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.ours:
        print(json.dumps(run_ours(args)))
        return

    tokenizer = example_epoch.load_tokenizer(args.data)
    rows = example_epoch.load_rows(args.data, "train", tokenizer)
    checked = example_epoch.check(rows, tokenizer, DEFAULT_RATE, CHECKED_STEPS)
    if checked["largest_difference"] > TOLERANCE:
        sys.exit(f"error: the two ways to compute the example's step differ by {checked['largest_difference']}")
    example = example_losses(args)
    best = min(example, key=lambda rate: example[rate]["eval_loss"])
    rates = {"default": DEFAULT_RATE, "best": best}

    this = [sys.executable, "-m", "benchmarks.bench_time_to_loss", "--data", args.data, "--work", args.work]
    step = [sys.executable, "-m", "benchmarks.masked_lm_example", *example_files(args), "--steps", 12, "--warm_up", 3]
    cases = {"example's step": Case(step, stock_environment())}
    cases |= {name: Case([*this, "--ours", tokens]) for name, tokens in BUDGETS.items()}
    measured = run_rounds(cases, args.rounds)
    table = [row(name, rates[name], example[rates[name]], measured, args.baseline_in_full) for name in BUDGETS]
    table[1]["example's learning rate"] += " of " + ", ".join(f"{rate:g}" for rate in args.rates)
    command = shlex.join(["python", "-m", "benchmarks.bench_time_to_loss", *sys.argv[1:]])
    details = [{"check": checked["largest_difference"], "example": example}, *measured]
    write_results("bench_time_to_loss", command, table, details)


def row(name, rate, example, measured, in_full):
    """One line of the table: the example with a learning rate against ours."""
    losses = [figures[name]["eval_loss"] for figures in measured]
    epochs = [example["of"] * figures["example's step"]["step_seconds"] for figures in measured]
    epochs = [example["seconds_per_step"] * example["of"]] * len(measured) if in_full else epochs
    ours = [figures[name]["seconds"] for figures in measured]
    ratios = [epoch / seconds for epoch, seconds in zip(epochs, ours, strict=True)]
    summary = lambda values: spread((statistics.median(values), min(values), max(values)))  # noqa: E731
    return {
        "example's learning rate": f"{rate:g} ({name})",
        "loss to reach": f"{example['eval_loss']:.3f}",
        "our loss": f"{max(losses):.3f}",
        "reached": "yes" if max(losses) <= example["eval_loss"] else "no",
        "tokens, ours / example's": f"{measured[0][name]['tokens']:,} / {example['tokens']:,}",
        "seconds of the example": summary(epochs),
        "seconds of ours": summary(ours),
        "times less": summary(ratios),
    }


if __name__ == "__main__":
    main()
