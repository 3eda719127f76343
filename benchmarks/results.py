"""What a benchmark leaves: benchmarks/results/<name>.json, and its table in benchmarks/README.md."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from benchmarks.interleaved import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def write_results(name, command, rows, details):
    """Write a benchmark's results and bring its table in benchmarks/README.md up to date.

    Args:
        name: of the benchmark; the README holds a line `<!-- name -->`, and a line `<!-- end -->` after it.
        command: as a user would type it.
        rows: list of dict with the same keys, the table's header; values are shown as they are.
        details: what the rows were computed from, for the JSON file (the figures of every round).
    """
    facts = {"command": command, "date": f"{datetime.date.today()}", "commit": _commit(), **machine_facts()}
    written = {**facts, "rows": rows, "details": details}
    (FOLDER / "results").mkdir(exist_ok=True)
    (FOLDER / "results" / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    loads = [figures["load"] for figures in details if "load" in figures]
    load = f"; load average before a round {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    note = (
        f"`{command}`: {facts['machine']}, {facts['cores']} cores, bf16 instructions: {facts['bf16']}; "
        f"{facts['date']}; commit {facts['commit']}; torch {facts['versions']['torch']}, "
        f"transformers {facts['versions']['transformers']}{load}."
    )
    _put_between(FOLDER / "README.md", f"<!-- {name} -->", f"{note}\n\n{_table(rows)}")


def machine_facts():
    """The machine and the versions that a number belongs to.

    Returns:
        dict: machine, cores, bf16 (whether the CPU has instructions for it), versions.
    """
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = [line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")]
    bf16 = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return {
        "machine": model[0] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bf16": ", ".join(bf16) or "none",
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
    }


def spread(values):
    """(median, least, most) as "12.3 (11.9 to 12.8)"."""
    return "{:.4g} ({:.4g} to {:.4g})".format(*values)


def _commit():
    words = ["git", "describe", "--always", "--exclude=*"]
    commit = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    # what an earlier table wrote is no change of what is measured
    words = ["git", "status", "--porcelain", "--untracked-files=no", ":!benchmarks/README.md", ":!benchmarks/results"]
    changed = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True).stdout
    return f"{commit}-dirty" if changed else commit or "unknown"


def _table(rows):
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _put_between(path, start, text):
    before, marker, after = path.read_text().partition(start)
    if not marker:
        raise SystemExit(f"error: {path} has no line {start}")
    path.write_text(f"{before}{start}\n{text}\n<!-- end -->{after.partition('<!-- end -->')[2]}")
