"""Side-by-side measurements: every case in a fresh process, one after the other, round after round."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from common.memory_settings import SETTINGS

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """A process to measure.

    command: words; the last line of its standard output is a JSON object of numbers. env: added to the environment.
    """

    command: list
    env: dict = field(default_factory=dict)


def run_rounds(cases, rounds):
    """Run every case once per round, in turn, so that a slow minute of the machine falls on all of them.

    Args:
        cases: dict of name to Case.
        rounds: int.
    Returns:
        list of dict, one per round: {"load": load average (1 minute) before it, name: the case's figures}.
    Raises:
        SystemExit: a case failed, or printed no figures.
    """
    measured = []
    for number in range(1, rounds + 1):
        figures = {"load": os.getloadavg()[0]}
        for name, case in cases.items():
            print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
            figures[name] = _measure(name, case)
        measured.append(figures)
    return measured


def run_script(script, flags, launcher=()):
    """Run an entry script of ours to its end, in a folder that is gone afterwards.

    Args:
        script: its file name; flags: words; launcher: words of accelerate launch's, where it is to start the script.
    Returns:
        (results, rows): all_results.json, and the lines of metrics.jsonl.
    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
        words = [sys.executable, *start, REPOSITORY / script, *flags, "--output_dir", out]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return json.loads((out / "all_results.json").read_text()), rows


def median(measured, name, figure):
    """(median, least, most) of one figure of a case over the rounds."""
    values = [figures[name][figure] for figures in measured]
    return statistics.median(values), min(values), max(values)


def ratio(measured, above, below, figure):
    """(median, least, most) over the rounds of one figure of case `above` over the same of case `below`."""
    values = [figures[above][figure] / figures[below][figure] for figures in measured]
    return statistics.median(values), min(values), max(values)


def stock_environment():
    """An environment without our memory settings: what a user has who knows nothing of them."""
    return dict.fromkeys(SETTINGS)


def _measure(name, case):
    env = {**os.environ, **case.env}
    env = {key: value for key, value in env.items() if value is not None}  # None: not set at all
    done = subprocess.run([str(word) for word in case.command], env=env, capture_output=True, text=True)
    try:
        if done.returncode:
            raise ValueError(f"exit code {done.returncode}")
        figures = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError as error:
        sys.exit(f"error: {name} gave no figures ({error}):\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return figures
