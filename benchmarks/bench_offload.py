"""Speed and peak memory of what keeps the optimizer in the host's memory: the same OPT, batch and optimizer for all.

    python -m benchmarks.bench_offload [--rounds 3] [--model 125m] [--processes 2] [--rows 4] [--length 128]

Every case is a run of run_clm.py under its YAML, on random tokens: 5 steps to warm up, then those that are measured.
Runs on GPUs where there are any. Writes benchmarks/results/bench_offload.json and a table in benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys

from benchmarks.interleaved import REPOSITORY, Case, median, ratio, run_rounds, run_script, stock_environment
from benchmarks.results import spread, write_results
from common.memory import GB

CONFIGS = ("zero2_offload", "zero3_offload", "fsdp_offload", "colossalai_gemini_offload")
FIRST = CONFIGS[0]


def main():
    """Run the cases, or, as one of them, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="125m", help="As run_clm.py's --model_size (default: %(default)s).")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="Rows of a process in a step (default: %(default)s).")
    parser.add_argument("--length", type=int, default=128, help="Tokens in a row (default: %(default)s).")
    parser.add_argument("--steps", type=int, default=10, help="Steps that are measured (default: %(default)s).")
    parser.add_argument("--measure", help="Internal: the YAML's name.")
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args)))
    cases = {}
    for name in CONFIGS:
        words = [sys.executable, "-m", "benchmarks.bench_offload", *sys.argv[1:], "--measure", name]
        cases[name] = Case(words, stock_environment())  # the script makes its own settings
    measured = run_rounds(cases, args.rounds)
    command = shlex.join(["python", "-m", "benchmarks.bench_offload", *sys.argv[1:]])
    write_results("bench_offload", command, [line_of(name, measured) for name in CONFIGS], measured)


def measure(args):
    """Run the script under a YAML. Returns: dict: tokens_per_second, peak_memory_bytes, and what a process holds."""
    launcher = ["--config_file", REPOSITORY / "accelerate_configs" / f"{args.measure}.yaml"]
    launcher += ["--num_processes", args.processes]
    flags = ["--model_size", args.model, "--synthetic_data", "--optimizer_type", "adamw"]
    flags += ["--per_device_train_batch_size", args.rows, "--train_batch_size", args.rows * args.processes]
    flags += ["--block_size", args.length, "--throughput_steps", args.steps]
    results, _ = run_script("run_clm.py", flags, launcher)
    names = ("tokens_per_second", "peak_memory_bytes", "parameter_bytes_per_rank", "optimizer_bytes_per_rank")
    return {name: results[name] for name in names}


def line_of(name, measured):
    """A line of the table."""
    return {
        "YAML": f"`{name}`",
        "tokens/s": spread(median(measured, name, "tokens_per_second")),
        f"tokens/s over {FIRST}'s": spread(ratio(measured, name, FIRST, "tokens_per_second")),
        "peak memory of a process, GB": f"{median(measured, name, 'peak_memory_bytes')[0] / GB:.2f}",
        "parameters it holds, GB": f"{median(measured, name, 'parameter_bytes_per_rank')[0] / GB:.2f}",
        "optimizer state it holds, GB": f"{median(measured, name, 'optimizer_bytes_per_rank')[0] / GB:.2f}",
    }


if __name__ == "__main__":
    main()
