"""Peak memory of a language model's loss over 8,192 tokens: run_clm.py's against the plain one, at OPT-125m's head.

    python -m benchmarks.bench_loss_memory [--rounds 5]

What is measured is the growth of a fresh process's peak resident memory over forward and backward of the loss, from
hidden states and head to their gradients; these inputs and the head's gradient, which both need, do not count. Writes
benchmarks/results/bench_loss_memory.json and a table in benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks.interleaved import Case, median, ratio, run_rounds, stock_environment
from benchmarks.results import spread, write_results
from common.memory_settings import SETTINGS
from common.models.cross_entropy import linear_cross_entropy
from common.utilisation import peak_resident_bytes, resident_bytes

TOKENS, HIDDEN, VOCABULARY = 8192, 768, 50272
WARM_UP_TOKENS = 8  # so that what the libraries take once does not count
ENVIRONMENTS = {"stock": stock_environment(), "as run_clm.py sets it": SETTINGS}


def ours(hidden, head, labels):
    """The mean loss by common/models/cross_entropy.py."""
    return linear_cross_entropy(hidden, head, None, labels, torch.full((len(labels),), 1 / len(labels)))


def plain(hidden, head, labels):
    """The mean loss with all logits at once, as stock models compute it."""
    return F.cross_entropy(F.linear(hidden, head), labels)


LOSSES = {"ours": ours, "plain": plain}


def main():
    """Compare the two, or, as one of the cases, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=LOSSES, help="Internal: which loss.")
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(LOSSES[args.measure])))
    cases = {
        f"{name}, {where}": Case([sys.executable, "-m", "benchmarks.bench_loss_memory", "--measure", name], env)
        for where, env in ENVIRONMENTS.items()
        for name in LOSSES
    }
    measured = run_rounds(cases, args.rounds)
    command = shlex.join(["python", "-m", "benchmarks.bench_loss_memory", *sys.argv[1:]])
    write_results("bench_loss_memory", command, [line_of(where, measured) for where in ENVIRONMENTS], measured)


def measure(loss_of):
    """Forward and backward of a loss in this process.

    Returns:
        dict: megabytes (1e6 bytes) of growth, seconds, loss.
    """
    torch.manual_seed(0)
    hidden, head = torch.randn(TOKENS, HIDDEN), 0.02 * torch.randn(VOCABULARY, HIDDEN)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    for tensor in (hidden, head):
        tensor.requires_grad_()
    loss_of(hidden[:WARM_UP_TOKENS], head[:WARM_UP_TOKENS], labels[:WARM_UP_TOKENS] % WARM_UP_TOKENS).backward()
    hidden.grad = head.grad = None
    before, began = resident_bytes(), time.perf_counter()
    loss = loss_of(hidden, head, labels)
    loss.backward()
    seconds, growth = time.perf_counter() - began, peak_resident_bytes() - before - head.grad.nbytes
    return {"megabytes": growth / 1e6, "seconds": seconds, "loss": loss.item()}


def line_of(where, measured):
    """A line of the table."""
    names = {name: f"{name}, {where}" for name in LOSSES}
    return {
        "tokens": f"{TOKENS:,}",
        "head": f"{VOCABULARY:,} x {HIDDEN}",
        "environment": where,
        "plain, MB": spread(median(measured, names["plain"], "megabytes")),
        "ours, MB": spread(median(measured, names["ours"], "megabytes")),
        "ratio": spread(ratio(measured, names["ours"], names["plain"], "megabytes")),
        "plain, s": spread(median(measured, names["plain"], "seconds")),
        "ours, s": spread(median(measured, names["ours"], "seconds")),
    }


if __name__ == "__main__":
    main()
