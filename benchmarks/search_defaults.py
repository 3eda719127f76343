"""Search for defaults of run_pretraining.py: held-out loss of bert-mini on WikiText-2 after a budget of tokens.

    python -m benchmarks.search_defaults \\
        --tokens 100000 --trial "--optimizer_type muon --learning_rate 3e-3" --trial "--learning_rate 1e-3"

Each trial is what run_pretraining.py does with these flags, in this process: its schedule ends with the budget. The
loss is example_epoch.py's: stock rows, masks at 15 %. A trial appends one JSON line to
benchmarks/results/search_defaults.jsonl; one that is already there is not run again, so a search that was stopped goes
on when its command is repeated.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import BertForMaskedLM

from benchmarks import example_epoch
from common import parallel
from common.arguments import parse_pretraining_arguments
from common.data.batches import Masking, TrainBatches
from common.data.packing import Frame, build_rows
from common.data.prepare import prepare_corpus
from common.models.mlm import build_mlm_model
from common.optimizers import build_optimizer, estimates_curvature
from common.schedulers import LRScheduler, learning_rate_factor
from common.unigram import start_from_frequencies

RESULTS = Path(__file__).parent / "results" / "search_defaults.jsonl"


def wikitext_flags(data, work):
    """Flags of run_pretraining.py for WikiText-2 with BERT's vocabulary."""
    text, vocabulary = Path(data) / "wikitext-2", Path(data) / "vocab/bert-base-uncased/vocab.txt"
    files = ["--train_file", text / "train.txt", "--validation_file", text / "valid.txt"]
    return [*map(str, files), "--tokenizer_name", str(vocabulary), "--vocab_size", "30522", "--cache_dir", str(work)]


def train(flags, tokens):
    """Train as run_pretraining.py does, on one process in fp32.

    Args:
        flags: list of words for run_pretraining.py; tokens: budget, padding counted, rounded up to whole steps.
    Returns:
        (model, steps, seconds_per_step): the seconds are the median over the steps.
    """
    _, data_args, args, _ = parse_pretraining_arguments([*flags, "--max_train_steps", "1"])
    steps = -(-tokens // (args.train_batch_size * data_args.max_seq_length))
    model, optimizer, scheduler, batches, args = start([*flags, "--max_train_steps", str(steps)])
    if estimates_curvature(optimizer):
        sys.exit(
            f"error: --optimizer_type {args.optimizer_type} wants estimates between the steps, which are not made here"
        )
    times = []
    for step in range(steps):
        began = time.perf_counter()
        scheduler.step(step / steps)
        make_step(model, optimizer, next(batches), args, step)
        times.append(time.perf_counter() - began)
    return model, steps, statistics.median(times)


def start(flags):
    """What run_pretraining.py has before its first step, on one process.

    Args:
        flags: list of words for run_pretraining.py, with a limit.
    Returns:
        (model, optimizer, LRScheduler, iterator of batches, TrainingArguments).
    """
    model_args, data_args, args, _ = parse_pretraining_arguments(flags)
    corpus = prepare_corpus(data_args, lambda *_: None)
    folder = corpus.rows_folder / "train"
    frame = Frame.for_masked(corpus.tokenizer)
    rows = build_rows(corpus.train, frame, data_args.max_seq_length, data_args.packing, folder)
    masking = Masking.for_tokenizer(corpus.tokenizer, data_args.mlm_probability)
    set_seed(args.seed)
    model = build_mlm_model(model_args, data_args, corpus.tokenizer).train()
    if model_args.init_output_bias == "unigram":
        start_from_frequencies(model, corpus.train)
    optimizer = build_optimizer(model, args)
    curve = {"curve": args.lr_scheduler_type, "min_lr_ratio": args.min_lr_ratio, **args.curve_options}
    factor = partial(learning_rate_factor, warmup_proportion=args.warmup_proportion, **curve)
    scheduler = LRScheduler(optimizer, factor)
    place = {"rank": 0, "ranks": 1, "device": torch.device("cpu")}
    batches = iter(TrainBatches(rows, masking, args.seed, args.train_batch_size, 1, **place))
    return model, optimizer, scheduler, batches, args


def make_step(model, optimizer, item, args, step):
    """A step of run_pretraining.py in fp32. Args: item: of the iterator that start() returned; step: its number."""
    batch, number, _ = item
    parallel.seed_dropout(args.seed, step, number)
    model(**batch).loss.backward()
    if args.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=example_epoch.DATA, help="folder that holds wikitext-2 and vocab")
    parser.add_argument("--work", type=Path, default=example_epoch.WORK, help="folder for prepared data")
    parser.add_argument("--tokens", type=int, default=100_000, help="budget of each trial")
    parser.add_argument("--trial", action="append", required=True, help="flags of run_pretraining.py, as one word")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    evaluation = example_epoch.Evaluation(args.data, example_epoch.load_tokenizer(args.data))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for trial in args.trial:
        key = {"flags": trial, "tokens": args.tokens}
        done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
        if any(key.items() <= line.items() for line in done):
            continue
        flags = [*wikitext_flags(args.data, args.work), *shlex.split(trial)]
        model, steps, seconds_per_step = train(flags, args.tokens)
        stock = BertForMaskedLM(model.config)
        stock.load_state_dict(model.state_dict())
        loss = evaluation(stock, masked_only=True)
        line = key | {"steps": steps, "eval_loss": round(loss, 4), "seconds_per_step": round(seconds_per_step, 4)}
        line["threads"] = torch.get_num_threads()
        with open(args.results, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
