"""One shard: read it, tokenize it with all cores, write it whole or not at all."""

import json
import time
from itertools import islice

import filelock
import numpy as np

from common.data.documents import BadRecords, read_labelled
from common.data.token_files import TokenFileWriter, token_dtype
from common.data.tokenizing import BATCH_CHARACTERS
from common.data.workers import map_batches
from common.errors import UserError
from common.prepare.encoding import Dropped, make_shard_encoder
from common.prepare.shards import ShardFiles

SECONDS_BETWEEN_REPORTS = 30


def write_shard(shard, folder, prepared_with, args, workers, say):
    """Tokenize a shard, unless that is done.

    Args:
        shard: common.prepare.shards.Shard; folder: Path of the shards.
        prepared_with: common.prepare.settings.Settings.
        args: PrepareArguments; workers: processes; say: function that prints a line.
    Raises:
        UserError: unreadable input, a shard made with other settings, another process at work on this one.
    """
    files, settings = ShardFiles(folder, shard), prepared_with.of_shard(shard)
    try:
        with filelock.FileLock(folder / f".{shard.name}.lock", timeout=0):
            if files.is_finished(settings):
                say(f"shard {shard.number}: finished already")
                return
            _write(shard, files, settings, prepared_with, args, workers, say)
    except filelock.Timeout:
        raise UserError(f"shard {shard.number}: another process is preparing it; wait, or give other shards") from None


def _write(shard, files, settings, prepared_with, args, workers, say):
    began = last_report = time.monotonic()
    bad_records = BadRecords(args.max_bad_records)
    characters = 0

    sources = {}  # numbers by label

    def batches():
        nonlocal characters
        batch, numbers, size = [], [], 0
        for document, label in shard_documents(shard, args, bad_records):
            batch.append(document)
            numbers.append(sources.setdefault(label, len(sources)))
            size += len(document)
            if size >= BATCH_CHARACTERS:
                characters += size
                yield batch, numbers
                batch, numbers, size = [], [], 0
        characters += size
        yield batch, numbers

    dtype = token_dtype(prepared_with.vocab_size)
    how = (prepared_with.how,)
    if workers == 1:
        results = map(make_shard_encoder(*how, say), batches())
    else:
        results = map_batches(batches(), make_shard_encoder, how, workers, say, flag="--workers")
    dropped = Dropped()
    facts_of_documents = []  # their hashes and the numbers of their sources
    with TokenFileWriter(files.prefix, dtype) as writer:
        for tokens, lengths, counts, *of_texts, left_out in results:
            dropped.add(left_out)
            writer.append(tokens, lengths, counts)
            facts_of_documents.append(of_texts)
            if time.monotonic() - last_report >= SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                rate = characters / 1e6 / (last_report - began)
                say(f"shard {shard.number}: {characters / 1e6:,.0f} MB of text so far, {rate:.1f} MB/s")
        seconds = time.monotonic() - began
        facts = {"settings": settings, "characters": characters, "bad_records": bad_records.count}
        columns = map(np.concatenate, zip(*facts_of_documents, strict=True))
        facts |= {"dropped": dropped.reasons}
        facts |= {"seconds": round(seconds, 2), "sources": list(sources), "facts": files.write_facts(*columns)}
        written = writer.finish(prepared_with.of_token_file() | facts)
    line = {name: written[name] for name in ("num_documents", "num_tokens", "characters", "bad_records", "seconds")}
    with open(files.prefix.parent / "log.jsonl", "a") as log:
        log.write(json.dumps({"shard": shard.number} | line) + "\n")
    for reason, (count, _) in dropped.reasons.items():
        say(f"shard {shard.number}: left out {count:,}: {reason}")
    say(
        f"shard {shard.number}: {written['num_documents']:,} documents, {characters / 1e6:,.1f} MB of text, "
        f"{written['num_tokens'] / 1e6:.2f} M tokens in {seconds:.1f} s ({characters / 1e6 / seconds:.1f} MB/s)"
    )


def shard_documents(shard, args, bad_records):
    """Yield (text, label) of a shard's documents.

    Args:
        shard: Shard; args: PrepareArguments; bad_records: BadRecords.
    """
    for path, first, step in shard.parts:
        documents = read_labelled([path], args.text_column, args.document_separator, bad_records)
        for text, label in islice(documents, first, None, step):
            if args.components is None or label in args.components:
                yield text, label
