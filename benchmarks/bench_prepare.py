"""prepare_pile_data.py: its speed with one worker and with all, and its memory at three sizes of a corpus.

    python -m benchmarks.bench_prepare [--megabytes 10,100,1000] [--rounds 5]

Speed is the whole program's on a file of the middle size, start-up included, with one worker and with one for each
core, and per core that of Rust's encode_batch_fast alone on the same text, in one process and in one for each core at
once: what the machine itself makes of more cores. Memory is read 20 times a second: the most that the program and any
one of its workers had, without the pages of mapped files, which the system takes back when it needs them (they stand
in the .json). Writes benchmarks/results/bench_prepare.json
and a table in benchmarks/README.md.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.bench_data import ONE_CORE, embedded_text
from benchmarks.bench_pretraining import DATA
from benchmarks.interleaved import REPOSITORY, Case, median, ratio, run_rounds
from benchmarks.results import spread, write_results

TOKENIZERS = {"WordPiece": DATA / "vocab" / "bert-base-uncased", "byte-level BPE": DATA / "vocab" / "opt"}
SECONDS_BETWEEN_READINGS = 0.05
RUST_BYTES = 25_000_000  # of the text: its speed does not depend on more


def main():
    """Run all of it, or, as a case of a round, measure and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", default="10,100,1000", help="Sizes of the corpora.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs=4, help="Internal: program or rust, processes, text, tokenizer.")
    args = parser.parse_args()
    if args.case:
        measure = {"program": prepared, "rust": rust}[args.case[0]]
        print(json.dumps(measure(Path(args.case[2]), args.case[3], int(args.case[1]))))
        return
    if not DATA.is_dir():
        sys.exit(f"error: no folder {DATA}: set FRUGAL_TEST_DATA to a folder with wikitext-2 and vocab")
    sizes = [int(part) for part in args.megabytes.split(",")]
    table, details, cores = [], [], os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        texts = {size: corpus(Path(folder) / f"{size}.txt", size * 10**6) for size in sizes}
        for name, tokenizer in TOKENIZERS.items():
            text = texts[sizes[len(sizes) // 2]]
            cases = {
                f"{what} {number}": case_of(what, number, text, tokenizer)
                for what in ("program", "rust")
                for number in (1, cores)
            }
            measured = run_rounds(cases, args.rounds)
            details += [{"tokenizer": name, **figures} for figures in measured]
            table += speed_lines(name, measured, cores)
        for size, text in texts.items():
            figures = prepared(text, TOKENIZERS["WordPiece"], cores)
            details.append({"megabytes": size, **figures})
            memory = f"{figures['parent'] / 1e6:.0f} MB, {figures['worker'] / 1e6:.0f} MB"
            table.append({"what": f"{size:,} MB of text: own memory of the program, of a worker", "measured": memory})
    words = ["python", "-m", "benchmarks.bench_prepare", *sys.argv[1:]]
    write_results("bench_prepare", shlex.join(words), table, details)


def case_of(what, processes, text, tokenizer):
    """A process of a round."""
    command = [sys.executable, "-m", "benchmarks.bench_prepare", "--case", what, processes, text, tokenizer]
    return Case(command, {} if what == "program" else ONE_CORE)


def speed_lines(name, measured, cores):
    """Lines of the table for one tokenizer."""
    one, every = "program 1", f"program {cores}"
    tokenizing, whole, limit = (
        [value / cores for value in ratio(measured, f"{what} {cores}", f"{what} 1", figure)]
        for what, figure in (("program", "tokenizing"), ("program", "speed"), ("rust", "speed"))
    )
    return [
        {"what": f"{name}: MB/s with one worker", "measured": spread(median(measured, one, "speed"))},
        {"what": f"{name}: MB/s with {cores}", "measured": spread(median(measured, every, "speed"))},
        {"what": f"{name}: efficiency of {cores} workers, tokenizing", "measured": spread(tokenizing)},
        {"what": f"{name}: the same of the whole program, start-up and merging included", "measured": spread(whole)},
        {"what": f"{name}: the same of {cores} processes of encode_batch_fast alone", "measured": spread(limit)},
        {
            "what": f"{name}: one worker's speed over encode_batch_fast's on one core",
            "measured": spread(ratio(measured, one, "rust 1", "speed")),
        },
    ]


def corpus(path, size):
    """A text file of documents that differ: WikiText-2 and the embedded corpus over and over, each line numbered."""
    sources = [DATA / "wikitext-2" / "train.txt", embedded_text()]
    lines = [line for source in sources for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    with open(path, "w", encoding="utf-8") as file:
        for number, line in enumerate(itertools.cycle(lines)):
            if file.tell() >= size:
                break
            file.write(f"{line} {number}\n")
    return path


def prepared(text, tokenizer, workers):
    """Run the program.

    Returns:
        dict: MB/s of all of it ("speed") and of its tokenizing alone, from the start of the workers on;
        the most bytes of the parent and of a worker, own and with files.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "prepare_pile_data.py", "--input", text, "--tokenizer_name", tokenizer]
        command += ["--output_dir", folder, "--workers", str(workers)]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        parent, peaks = psutil.Process(process.pid), {}
        while process.poll() is None:
            try:
                note_memory(peaks, "parent", parent)
                for child in parent.children():
                    note_memory(peaks, "worker", child)
            except psutil.NoSuchProcess:
                continue
            time.sleep(SECONDS_BETWEEN_READINGS)
        if process.returncode:
            sys.exit(f"error: {shlex.join(map(str, command))} ended with code {process.returncode}")
        size, seconds = text.stat().st_size / 1e6, time.perf_counter() - began
        tokenized = json.loads((Path(folder) / "shards" / "00000.json").read_text())
        return {"speed": size / seconds, "tokenizing": size / tokenized["seconds"], **peaks}


def note_memory(peaks, name, process):
    """Keep the largest memory seen under a name: the process's own, and with the pages of files that it maps."""
    found = process.memory_info()
    for key, size in ((name, found.rss - found.shared), (f"{name} with files", found.rss)):
        peaks[key] = max(peaks.get(key, 0), size)


def rust(text, tokenizer, processes):
    """Speed of the tokenizers library alone, of so many processes at once on the whole text each, in MB/s together."""
    tasks = [(text, tokenizer)] * processes
    if processes == 1:
        return {"speed": rust_speed(*tasks[0])}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return {"speed": sum(pool.starmap(rust_speed, tasks, chunksize=1))}


def rust_speed(text, tokenizer):
    """MB/s of encode_batch_fast on one core."""
    from common.data.tokenizers import load_tokenizer
    from common.prepare.inputs import ANY

    backend = load_tokenizer(tokenizer, kind=ANY).backend_tokenizer
    with open(text, encoding="utf-8") as file:
        documents = file.readlines(RUST_BYTES)
    began = time.perf_counter()
    for at in range(0, len(documents), 4000):
        backend.encode_batch_fast(documents[at : at + 4000], add_special_tokens=False)
    seconds = time.perf_counter() - began
    return sum(len(document.encode()) for document in documents) / 1e6 / seconds


if __name__ == "__main__":
    main()
