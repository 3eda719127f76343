"""Two stages on two processes of one thread each: no flush (2BW), a flush after each batch (1F1B), and no pipelining.

    python -m benchmarks.bench_pipeline [--rounds 5] [--steps 40] [--loss_steps 200] [--seeds 42 1 2]

Every case is a run of run_pretraining.py --throughput_steps as accelerate launches it: a BERT of eight layers of 256,
batches of two micro-batches of 16 rows of 64 tokens. Without pipelining the second micro-batch enters when the first
has left. With --loss_steps N, the held-out loss on WikiText-2 after N steps of 2BW, of 2BW with corrected updates and
of 1F1B, with AdamW and with Muon, too, of half the layers and width. Writes benchmarks/results/bench_pipeline.json and
bench_pipeline_loss.json, the timelines beside them, and tables in benchmarks/README.md.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.interleaved import REPOSITORY, Case, median, ratio, run_rounds
from benchmarks.results import FOLDER, spread, write_results

MICRO_ROWS, LENGTH = 16, 64
STAGES = 2
SCHEDULES = {  # name in the table: (schedule, micro-batches that go through it together)
    "2BW": ("2bw", 2),
    "1F1B": ("1f1b", 2),
    "no pipelining": ("gpipe", 1),
}
LOSSES = {"2BW": ("2bw", 2), "2BW, corrected": ("2bw_corrected", 2), "1F1B": ("1f1b", 2)}
MODEL = ["--hidden_size", 256, "--num_hidden_layers", 8, "--num_attention_heads", 4, "--intermediate_size", 1024]
MODEL += ["--tokenizer_train_vocab_size", 4000]  # with it both stages take as long
SMALL = ["--hidden_size", 128, "--num_hidden_layers", 4, "--num_attention_heads", 2, "--intermediate_size", 512]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
DATA = Path(os.environ.get("FRUGAL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
OPTIMIZERS = {"adamw": 2e-3, "muon": 2e-3}  # learning rates


def main():
    """Run the cases, or, as one of them, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="Of the speeds; 0: none (default: %(default)s).")
    parser.add_argument("--steps", type=int, default=40, help="Measured steps of a run (default: %(default)s).")
    parser.add_argument("--loss_steps", type=int, default=0, help="Steps of the comparison of losses; 0: none.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="Of the losses' runs (default: 42).")
    parser.add_argument("--case", nargs=2, help="Internal: name of a schedule, steps.")
    parser.add_argument("--loss_case", nargs=4, help="Internal: name of a schedule, optimizer, steps, seed.")
    args = parser.parse_args()
    if args.case:
        return print(json.dumps(speed(args.case[0], int(args.case[1]))))
    if args.loss_case:
        return print(json.dumps(loss(*args.loss_case)))
    this = [sys.executable, "-m", "benchmarks.bench_pipeline"]
    command = shlex.join(["python", "-m", "benchmarks.bench_pipeline", *sys.argv[1:]])
    if args.rounds:
        cases = {name: Case([*this, "--case", name, args.steps], ONE_THREAD) for name in SCHEDULES}
        measured = run_rounds(cases, args.rounds)
        write_results("bench_pipeline", command, [line_of(name, measured) for name in SCHEDULES], measured)
    if args.loss_steps:
        measured = [round_ for seed in args.seeds for round_ in run_rounds(loss_cases(this, args, seed), 1)]
        rows = [line_of_loss(name, optimizer, measured) for optimizer in OPTIMIZERS for name in LOSSES]
        write_results("bench_pipeline_loss", command, rows, measured)


def loss_cases(this, args, seed):
    """The runs of a seed: dict of Case by name. Args: this: the command of this script."""
    return {
        f"{name}, {optimizer}": Case([*this, "--loss_case", name, optimizer, args.loss_steps, seed], ONE_THREAD)
        for optimizer in OPTIMIZERS
        for name in LOSSES
    }


def line_of_loss(name, optimizer, measured):
    """A line of the other table; what is above 1F1B is so with the same seed."""
    losses, of_flush = (
        [figures[f"{schedule}, {optimizer}"]["eval_loss"] for figures in measured] for schedule in (name, "1F1B")
    )
    above = [loss - other for loss, other in zip(losses, of_flush, strict=True)]
    return {
        "run": f"{name}, {optimizer}",
        "held-out loss": ", ".join(f"{loss:.4f}" for loss in losses),
        "above 1F1B": ", ".join(f"{loss:.4f}" for loss in above),
    }


def line_of(name, measured):
    """A line of the table."""
    return {
        "schedule": name,
        "tokens/s": spread(median(measured, name, "tokens_per_second")),
        "over 1F1B": spread(ratio(measured, name, "1F1B", "tokens_per_second")),
        "over no pipelining": spread(ratio(measured, name, "no pipelining", "tokens_per_second")),
        "share of the time waiting": spread(median(measured, name, "bubble_share")),
    }


def speed(name, steps):
    """Figures of a throughput experiment; its timeline is kept."""
    flags = ["--throughput_steps", steps, "--max_grad_norm", 1.0, "--optimizer_type", "adamw"]
    with tempfile.TemporaryDirectory() as folder:
        results = launch(name, Path(folder), flags)
        picture = FOLDER / "results" / f"pipeline_{SCHEDULES[name][0]}.png"
        picture.parent.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / "run" / "timeline.png", picture)
    return {key: results[key] for key in ("tokens_per_second", "samples_per_second", "bubble_share")}


def loss(name, optimizer, steps, seed):
    """The held-out loss after some steps."""
    flags = [*SMALL, "--max_train_steps", steps, "--seed", seed]
    flags += ["--optimizer_type", optimizer, "--learning_rate", OPTIMIZERS[optimizer]]
    text = DATA / "wikitext-2"
    flags += ["--train_file", text / "train.txt", "--validation_file", text / "valid.txt", "--max_eval_samples", 512]
    with tempfile.TemporaryDirectory() as folder:
        return {"eval_loss": launch(name, Path(folder), flags)["eval_loss"]}


def launch(name, folder, flags):
    """Run two processes to their end. Returns: all_results.json."""
    schedule, micro_batches = (SCHEDULES | LOSSES)[name]
    role = f"pipeline schedule={schedule} stages={STAGES} micro_batches={micro_batches}"
    config = folder / "config.yaml"
    text = (REPOSITORY / "accelerate_configs" / "pipeline_1f1b.yaml").read_text()
    config.write_text(text.replace("pipeline schedule=1f1b stages=2 micro_batches=4", role))
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--mixed_precision", "no"]
    words += [REPOSITORY / "run_pretraining.py", *MODEL, "--max_seq_length", LENGTH, "--packing", "concat"]
    words += ["--train_batch_size", 2 * MICRO_ROWS, "--per_device_train_batch_size", micro_batches * MICRO_ROWS]
    words += ["--attn_implementation", "sdpa", "--output_dir", folder / "run", *flags]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads((folder / "run" / "all_results.json").read_text())


if __name__ == "__main__":
    main()
