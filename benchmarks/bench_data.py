"""The data path: tokenizing, collating, size on disk, and the time to a first step.

    python -m benchmarks.bench_data [--rounds 5]

Against Hugging Face's masked-LM example: two passes of datasets.map, an arrow file, the stock collator. Tokenizing and
collating run on one core. Writes benchmarks/results/bench_data.json and a table in benchmarks/README.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from benchmarks.bench_pretraining import CACHE, DATA
from benchmarks.interleaved import REPOSITORY, Case, median, ratio, run_rounds
from benchmarks.results import spread, write_results
from common.memory_settings import SETTINGS

VOCABULARY = DATA / "vocab" / "bert-base-uncased"
LENGTH, BATCH = 128, 32
OUR_BATCHES, STOCK_BATCHES = 4096, 100  # about as long
ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def main():
    """Run all rounds, or, as a case of one, measure and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, help="Internal: measure this here.")
    parser.add_argument("--text", type=Path, help="Internal: the text file to measure it with.")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(CASES[args.case](args.text)))
        return
    if not DATA.is_dir():
        sys.exit(f"error: no folder {DATA}: set FRUGAL_TEST_DATA to a folder with wikitext-2 and vocab")
    wikitext = DATA / "wikitext-2" / "train.txt"
    table, details = [], []
    for name, text in (("WikiText-2", wikitext), ("embedded corpus", embedded_text())):
        measured = run_rounds(cases(("ids", "files", "rust", "maps"), text), args.rounds)
        details += [{"text": name, **figures} for figures in measured]
        table += tokenizing_lines(name, measured)
    prepare(wikitext, CACHE)  # so that no case has to
    measured = run_rounds(cases(("stream", "stream_concat", "collator"), wikitext), args.rounds)
    details += measured
    table += [
        line(f"batches of {BATCH} x {LENGTH}, {packing}, tokens/s per core", measured, name, "collator", "speed")
        for name, packing in (("stream", "packed documents"), ("stream_concat", "one stream cut into rows"))
    ]
    measured = run_rounds(cases(("first_step",), wikitext), args.rounds)
    details += measured
    for figure, what in (
        ("seconds", "process start to the first optimizer step, prepared corpus, seconds"),
        ("import_seconds", "of these, starting Python and importing the libraries"),
    ):
        value = spread(median(measured, "first_step", figure))
        table.append({"what": what, "ours": value, "the example's way": "", "ratio": ""})
    words = ["python", "-m", "benchmarks.bench_data", *sys.argv[1:]]
    write_results("bench_data", shlex.join(words), table, details)


def cases(names, text):
    """The processes of a round, by name, on one core each."""
    command = [sys.executable, "-m", "benchmarks.bench_data", "--text", text, "--case"]
    env = {} if "first_step" in names else SETTINGS | ONE_CORE
    return {name: Case([*command, name], env) for name in names}


def line(what, measured, ours, theirs, figure):
    """A line of the table: one figure of two cases and its ratio."""
    return {
        "what": what,
        "ours": spread(median(measured, ours, figure)),
        "the example's way": spread(median(measured, theirs, figure)),
        "ratio": spread(ratio(measured, ours, theirs, figure)),
    }


def tokenizing_lines(name, measured):
    """Lines of the table for one text."""
    speed = "MB/s per core"
    return [
        line(
            f"{name}: documents to ids in an array, {speed} (the example: its two maps)",
            measured,
            "ids",
            "maps",
            "speed",
        ),
        line(f"{name}: text file to token files, everything included, {speed}", measured, "files", "maps", "speed"),
        line(f"{name}: against Rust's encode_batch_fast alone, {speed}", measured, "ids", "rust", "speed"),
        line(f"{name}: bytes per token on disk", measured, "files", "maps", "bytes_per_token"),
    ]


def embedded_text():
    """The embedded corpus as a text file, one document a line. Returns: its Path."""
    from common.data.embedded import embedded_documents

    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / "embedded.txt"
    path.write_text("".join(f"{document}\n" for document in embedded_documents()), encoding="utf-8")
    return path


def load():
    """The tokenizer of all cases."""
    from common.data.tokenizers import load_tokenizer

    return load_tokenizer(str(VOCABULARY))


def documents_of(text):
    """(lines that are not empty, their size in MB)."""
    documents = [line for part in text.read_text(encoding="utf-8").split("\n") if (line := part.strip())]
    return documents, sum(len(document.encode()) for document in documents) / 1e6


def data_arguments(text, cache):
    """The flags of one process that prepares a text."""
    from common.arguments import DataArguments

    flags = {"train_file": str(text), "tokenizer_name": str(VOCABULARY), "cache_dir": str(cache)}
    return DataArguments(**flags, preprocessing_num_workers=1)


def prepare(text, cache):
    """prepare_corpus in one process."""
    from common.data.prepare import prepare_corpus

    return prepare_corpus(data_arguments(text, cache), lambda _: None)


def ids(text):
    """Batches of documents, as preparing makes them, to ids in arrays."""
    import numpy as np

    from common.data.tokenizing import BATCH_CHARACTERS, tokenize

    documents, size = documents_of(text)
    backend = load().backend_tokenizer.to_str()
    number = max(1, len(documents) * BATCH_CHARACTERS // sum(map(len, documents)))
    batches = [documents[at : at + number] for at in range(0, len(documents), number)]
    began = time.perf_counter()
    tokens = sum(len(tokens) for tokens, _ in tokenize(batches, backend, np.uint16, 1, print))
    return {"speed": size / (time.perf_counter() - began), "tokens": tokens}


def files(text):
    """A text file to token files: read, hold out, tokenize, write, check."""
    from common.data.prepare import prepare_corpus

    load()
    size = documents_of(text)[1]
    with tempfile.TemporaryDirectory() as cache:
        arguments = data_arguments(text, cache)  # what it imports is not counted
        began = time.perf_counter()
        corpus = prepare_corpus(arguments, lambda _: None)
        seconds = time.perf_counter() - began
        parts = [path for part in (corpus.train, corpus.validation) for path in part.paths.values()]
        tokens = len(corpus.train.tokens) + len(corpus.validation.tokens)
        disk = sum(path.stat().st_size for path in parts)
    return {"speed": size / seconds, "tokens": tokens, "bytes_per_token": disk / tokens}


def rust(text):
    """The Rust tokenizer by itself, to lists of ids."""
    documents, size = documents_of(text)
    backend = load().backend_tokenizer
    began = time.perf_counter()
    for at in range(0, len(documents), 1000):
        encodings = backend.encode_batch_fast(documents[at : at + 1000], add_special_tokens=False)
        [encoding.ids for encoding in encodings]
    return {"speed": size / (time.perf_counter() - began)}


def maps(text):
    """The example's two passes, to arrow files; reading the text is not counted."""
    import datasets

    from benchmarks.masked_lm_example import rows

    tokenizer, size = load(), documents_of(text)[1]
    with tempfile.TemporaryDirectory() as cache:
        datasets.disable_progress_bars()
        datasets.load_dataset("text", data_files=str(text.resolve()), cache_dir=cache)
        flags = SimpleNamespace(train_file=text, cache_dir=cache, max_seq_length=LENGTH, line_by_line=False)
        began = time.perf_counter()
        made = rows(flags, tokenizer)
        seconds = time.perf_counter() - began
        disk = sum(Path(file["filename"]).stat().st_size for file in made.cache_files)
    return {"speed": size / seconds, "bytes_per_token": disk / (len(made) * LENGTH)}


def stream(text, packing="documents"):
    """Micro-batches as the training loop's prefetching thread makes them; padding does not count."""
    from common.data.batches import Masking, TrainBatches
    from common.data.packing import Frame, build_rows

    corpus = prepare(text, CACHE)
    rows = build_rows(corpus.train, Frame.for_masked(corpus.tokenizer), LENGTH, packing, corpus.rows_folder / "train")
    masking = Masking.for_tokenizer(corpus.tokenizer, 0.15)
    batches = TrainBatches(rows, masking, 0, BATCH, 1, 0, 1, device=None).micro_batches()
    next(batches)
    began = time.perf_counter()
    tokens = sum(tokens for _, _, tokens in islice(batches, OUR_BATCHES))
    return {"speed": tokens / (time.perf_counter() - began)}


def stream_concat(text):
    """The same with the example's rows."""
    return stream(text, "concat")


def collator(text):
    """The stock collator on rows of an arrow file, in the example's DataLoader."""
    import datasets
    import numpy as np
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling

    from common.data.packing import ConcatenatedRows, Frame

    corpus = prepare(text, CACHE)
    tokenizer = corpus.tokenizer
    rows = ConcatenatedRows(corpus.train, Frame.for_masked(tokenizer), LENGTH)
    built = rows.build(np.arange(min(len(rows), 2 * STOCK_BATCHES * BATCH)))
    columns = {
        "input_ids": built["input_ids"].astype(np.int32),
        "token_type_ids": np.zeros_like(built["input_ids"], np.int8),
        "attention_mask": np.ones_like(built["input_ids"], np.int8),
        "special_tokens_mask": (~built["is_text"]).astype(np.int8),
    }
    with tempfile.TemporaryDirectory() as folder:
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(columns).save_to_disk(folder)
        collate = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15)
        loader = iter(DataLoader(datasets.load_from_disk(folder), BATCH, shuffle=True, collate_fn=collate))
        next(loader)
        began = time.perf_counter()
        tokens = sum(batch["input_ids"].numel() for batch in islice(loader, STOCK_BATCHES))
        return {"speed": tokens / (time.perf_counter() - began)}


def first_step(text):
    """From the start of the process until metrics.jsonl holds the first step; then the imports by themselves."""
    script = REPOSITORY / "run_pretraining.py"
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--train_file", text, "--tokenizer_name", VOCABULARY, "--cache_dir", CACHE]
        flags += ["--preprocessing_num_workers", 1, "--max_train_steps", 1, "--logging_steps", 1]
        flags += ["--max_eval_samples", 1, "--output_dir", folder]
        metrics = Path(folder) / "metrics.jsonl"
        began = time.perf_counter()
        words = [str(word) for word in (sys.executable, script, *flags)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        if process.wait():
            sys.exit("error: run_pretraining.py failed")
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import run_pretraining"], cwd=REPOSITORY, check=True)
    return {"seconds": seconds, "import_seconds": time.perf_counter() - began}


CASES = {case.__name__: case for case in (ids, files, rust, maps, stream, stream_concat, collator, first_step)}


if __name__ == "__main__":
    main()
