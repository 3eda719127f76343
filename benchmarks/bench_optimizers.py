"""A race of optimizers on the embedded corpus: held-out loss after equal tokens and after equal time.

    python -m benchmarks.bench_optimizers
    python -m benchmarks.bench_optimizers --entries adamw,lion --tokens 300000 --seconds 30

Each trains the same tiny model on the same batches in fp32. Equal tokens: for each learning rate of a small grid,
which grows where its best rate lies at an end; the schedule ends with the tokens, and nothing depends on the machine's
speed. Equal time: each once more with its best rate, the schedule following the seconds of training; all take turns, a
second at a time, so that a slow moment of the machine falls on all of them. One seed. Leaves a table, JSON and a plot.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.results import FOLDER, write_results
from benchmarks.search_defaults import make_step, start
from common import parallel
from common.arguments import parse_pretraining_arguments
from common.curvature import Curvature
from common.data.batches import EvalBatches, Masking
from common.data.packing import Frame, build_rows
from common.data.prepare import prepare_corpus
from common.optimizers import estimates_curvature
from common.training import evaluate, judged_weights

MODEL = "--num_hidden_layers 2 --hidden_size 128 --num_attention_heads 2 --intermediate_size 512 --max_seq_length 64"
RECIPE = "--tokenizer_train_vocab_size 1024 --train_batch_size 16 --max_eval_samples 256 --fp32 --max_grad_norm 1"
CONSTANT = "--lr_scheduler_type constant"
ENTRIES = {  # name: (more flags, the learning rates to begin with)
    "adamw": ("", (1e-3, 3e-3, 1e-2)),
    "lamb": ("", (3e-3, 1e-2, 3e-2)),
    "lion": ("", (3e-4, 1e-3, 3e-3)),
    "muon": ("", (3e-3, 1e-2, 3e-2)),
    "adafactor": ("", (1e-2, 3e-2, 1e-1)),
    "shampoo": ("--optimizer_args preconditioning_compute_steps=10", (3e-2, 1e-1, 3e-1)),
    "soap": ("--optimizer_args max_precondition_dim=1024", (1e-3, 3e-3, 1e-2)),
    "sophia": ("", (3e-4, 1e-3, 3e-3)),
    "schedulefree": (CONSTANT, (3e-3, 1e-2, 3e-2)),
}
FACTOR, MOST_MORE = 3, 2  # a grid grows by this factor, at most so often
JUDGEMENTS = 8  # on the way, evenly spread


@dataclass
class Racer:
    """A model in training with its own clock, which stands still while others train or it is judged."""

    flags: list
    race: "Race"
    steps: int = 0
    seconds: float = 0.0
    step_seconds: list = field(default_factory=list)
    curve: list = field(default_factory=list)  # (tokens, seconds, held-out loss)

    def __post_init__(self):
        self.model, optimizer, self.scheduler, self.batches, self.args = start(self.flags)
        self.optimizer = self.race.accelerator.prepare_optimizer(optimizer)
        if estimates_curvature(optimizer):
            curvature = Curvature(self.race.accelerator, self.model, self.optimizer, self.args.seed)
            self.batches = curvature.before_steps(self.batches, 0)

    @property
    def tokens(self):
        """Tokens so far, padding counted."""
        return self.steps * self.args.train_batch_size * self.race.length

    def step(self, progress):
        """Train a step; the schedule stands at `progress`, in [0, 1]."""
        began = time.perf_counter()
        self.scheduler.step(min(1.0, progress))
        make_step(self.model, self.optimizer, next(self.batches), self.args, self.steps)
        self.step_seconds.append(time.perf_counter() - began)
        self.seconds += self.step_seconds[-1]
        self.steps += 1

    def judge(self):
        """Add a point to the curve. Returns: the held-out loss, infinite where training has failed."""
        if all(parameter.isfinite().all() for parameter in self.model.parameters()):
            with judged_weights(self.race.accelerator, self.model, self.optimizer):
                loss = evaluate(self.race.accelerator, self.model, self.race.eval_batches)["eval_loss"]
        else:
            loss = float("inf")
        self.curve.append((self.tokens, self.seconds, loss))
        return loss


class Race:
    """What all share: the corpus's held-out rows, and an accelerator of one process."""

    def __init__(self):
        self.accelerator = parallel.make_accelerator("no", "none")
        _, data_args, args, _ = parse_pretraining_arguments(flags_of("adamw", 1e-3))
        self.length = data_args.max_seq_length
        self.step_tokens = args.train_batch_size * self.length
        corpus = prepare_corpus(data_args, lambda *_: None)
        frame = Frame.for_masked(corpus.tokenizer)
        folder = corpus.rows_folder / "validation"
        rows = build_rows(corpus.validation, frame, self.length, data_args.packing, folder)
        masking = Masking.for_tokenizer(corpus.tokenizer, data_args.mlm_probability)
        place = {"rank": 0, "ranks": 1, "device": torch.device("cpu")}
        self.eval_batches = EvalBatches(rows, masking, data_args.max_eval_samples, 64, **place)

    def equal_tokens(self, name, rate, tokens):
        """Train for a number of tokens. Returns: Racer."""
        racer, steps = Racer(flags_of(name, rate), self), max(1, tokens // self.step_tokens)
        marks = {round(steps * part / JUDGEMENTS) for part in range(JUDGEMENTS + 1)}
        for step in range(steps + 1):
            if step in marks and racer.judge() == float("inf"):
                break
            if step < steps:
                racer.step(step / steps)
        print(f"{name} {rate:g}: {racer.curve[-1][2]:.4f} in {racer.seconds:.1f} s", file=sys.stderr, flush=True)
        return racer

    def equal_time(self, rates, seconds):
        """Train one of each for as long, in turn. Args: rates: dict by name. Returns: dict of Racer by name."""
        racers = {name: Racer(flags_of(name, rate), self) for name, rate in rates.items()}
        marks = {round(seconds * part / JUDGEMENTS) for part in range(JUDGEMENTS + 1)}
        for turn in range(seconds + 1):
            for racer in racers.values():
                if turn in marks:
                    racer.judge()
                while racer.seconds < min(seconds, turn + 1):
                    racer.step(racer.seconds / seconds)
        return racers


def flags_of(name, rate):
    """The command line of run_pretraining.py for an entry, with a limit that the caller replaces."""
    more, _ = ENTRIES[name]
    words = shlex.split(f"{MODEL} {RECIPE} {more}")
    return [*words, "--optimizer_type", name, "--learning_rate", str(rate), "--max_train_steps", "1000"]


def search(race, name, tokens):
    """Train with every rate of a grid, and beyond it while the best is at an end. Returns: dict of Racer by rate."""
    found = {rate: race.equal_tokens(name, rate, tokens) for rate in ENTRIES[name][1]}
    for _ in range(MOST_MORE):
        best = best_rate(found)
        if best not in (min(found), max(found)):
            break
        rate = float(f"{best * FACTOR if best == max(found) else best / FACTOR:.1g}")
        found[rate] = race.equal_tokens(name, rate, tokens)
    return found


def best_rate(found):
    """The learning rate with the lowest loss at the end."""
    return min(found, key=lambda rate: found[rate].curve[-1][2])


def plot(by_tokens, by_time, path):
    """Two panels of held-out loss: over tokens, over seconds. Args: dicts of Racer by name; path: of the PNG."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True, layout="constrained")
    for panel, racers, index, label in zip(
        panels, (by_tokens, by_time), (0, 1), ("tokens", "seconds of training"), strict=True
    ):
        for name in sorted(racers, key=lambda name: racers[name].curve[-1][2]):
            points = racers[name].curve
            color = f"C{list(by_tokens).index(name)}"
            panel.plot([p[index] for p in points], [p[2] for p in points], ".-", color=color, label=name)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.legend(title="best first", loc="upper left", bbox_to_anchor=(1, 1))
    panels[0].set_title("equal tokens")
    panels[1].set_title("equal time")
    panels[0].set_ylabel("held-out loss, nats")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def points(racer):
    """A curve for JSON, which has no infinity: lists of tokens, seconds, held-out loss or None."""
    finite = lambda loss: round(loss, 5) if loss < float("inf") else None  # noqa: E731
    return [[tokens, round(seconds, 3), finite(loss)] for tokens, seconds, loss in racer.curve]


def row(name, found, timed):
    """One line of the table."""
    best = best_rate(found)
    others = ", ".join(f"{rate:g}: {found[rate].curve[-1][2]:.3f}" for rate in sorted(found) if rate != best)
    return {
        "optimizer": f"{name} {ENTRIES[name][0]}".strip(),
        "best rate": f"{best:g}" + (" (an end of the grid)" if best in (min(found), max(found)) else ""),
        "loss, equal tokens": f"{found[best].curve[-1][2]:.3f}",
        "loss, equal time": f"{timed.curve[-1][2]:.3f}",
        "steps in that time": f"{timed.steps:,}",
        "ms per step": f"{1000 * statistics.median(timed.step_seconds):.1f}",
        "other rates, equal tokens": others,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", default=",".join(ENTRIES), help="which race, by commas")
    parser.add_argument("--tokens", type=int, default=100_000, help="of each training on equal tokens")
    parser.add_argument("--seconds", type=int, default=12, help="of each training on equal time")
    args = parser.parse_args()
    names = args.entries.split(",")
    if unknown := [name for name in names if name not in ENTRIES]:
        sys.exit(f"error: --entries {unknown[0]}: known are {', '.join(ENTRIES)}")
    load, race = os.getloadavg()[0], Race()
    grids = {name: search(race, name, args.tokens) for name in names}
    timed = race.equal_time({name: best_rate(found) for name, found in grids.items()}, args.seconds)
    rows = [row(name, grids[name], timed[name]) for name in names]
    rows.sort(key=lambda line: float(line["loss, equal tokens"]))
    (FOLDER / "results").mkdir(exist_ok=True)
    best = {name: found[best_rate(found)] for name, found in grids.items()}
    plot(best, timed, FOLDER / "results" / "bench_optimizers.png")
    curves = {name: {f"{rate:g}": points(racer) for rate, racer in found.items()} for name, found in grids.items()}
    in_time = {name: points(racer) for name, racer in timed.items()}
    command = shlex.join(["python", "-m", "benchmarks.bench_optimizers", *sys.argv[1:]])
    write_results("bench_optimizers", command, rows, [{"load": load, "equal tokens": curves, "equal time": in_time}])


if __name__ == "__main__":
    main()
