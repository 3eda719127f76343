"""One shard: read it, tokenize it with all cores, write it whole or not at all."""

import json
import time
from collections.abc import Callable
from itertools import islice

import filelock
import numpy as np

from common.data.documents import BadRecords, read_documents
from common.data.sources import document_hash
from common.data.token_files import TokenFileWriter, token_dtype
from common.data.tokenizers import corpus_encoder
from common.data.tokenizing import BATCH_CHARACTERS, join_ids
from common.data.workers import map_batches
from common.errors import UserError
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

    def batches():
        nonlocal characters
        batch, size = [], 0
        for document in shard_documents(shard, args, bad_records):
            batch.append(document)
            size += len(document)
            if size >= BATCH_CHARACTERS:
                characters += size
                yield batch
                batch, size = [], 0
        characters += size
        yield batch

    dtype = token_dtype(prepared_with.vocab_size)
    how = prepared_with.backend_json, np.dtype(dtype).str, prepared_with.eod
    if workers == 1:
        results = map(make_shard_encoder(*how, say), batches())
    else:
        results = map_batches(batches(), make_shard_encoder, how, workers, say, flag="--workers")
    hashes = []
    with TokenFileWriter(files.prefix, dtype) as writer:
        for tokens, lengths, of_texts in results:
            writer.append(tokens, lengths)
            hashes.append(of_texts)
            if time.monotonic() - last_report >= SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                rate = characters / 1e6 / (last_report - began)
                say(f"shard {shard.number}: {characters / 1e6:,.0f} MB of text so far, {rate:.1f} MB/s")
        if not writer.num_documents:
            raise UserError(f"shard {shard.number}: no documents in {shard.parts[0][0]}; check --text_column")
        seconds = time.monotonic() - began
        facts = {"settings": settings, "characters": characters, "bad_records": bad_records.count}
        facts |= {"seconds": round(seconds, 2), "hashes": files.write_hashes(np.concatenate(hashes))}
        written = writer.finish(prepared_with.of_token_file() | facts)
    line = {name: written[name] for name in ("num_documents", "num_tokens", "characters", "bad_records", "seconds")}
    with open(files.prefix.parent / "log.jsonl", "a") as log:
        log.write(json.dumps({"shard": shard.number} | line) + "\n")
    say(
        f"shard {shard.number}: {written['num_documents']:,} documents, {characters / 1e6:,.1f} MB of text, "
        f"{written['num_tokens'] / 1e6:.2f} M tokens in {seconds:.1f} s ({characters / 1e6 / seconds:.1f} MB/s)"
    )


def shard_documents(shard, args, bad_records):
    """Yield the documents (str) of a shard. Args: shard: Shard; args: PrepareArguments; bad_records: BadRecords."""
    for path, first, step in shard.parts:
        documents = read_documents([path], args.text_column, args.document_separator, bad_records)
        yield from islice(documents, first, None, step)


def make_shard_encoder(backend_json: str, dtype: str, eod: int | None, say: Callable[[str], None]) -> Callable:
    """The function from a list of documents to what a shard holds of them.

    Args:
        backend_json: the backend tokenizer's to_str(); dtype: numpy integer type of the ids; eod: id that ends every
            document, None for none; say: function that prints.
    Returns:
        function giving (tokens [T] of dtype, lengths int32 [n], hashes of the texts uint64 [n]); documents without a
        token are left out.
    """
    encode = corpus_encoder(backend_json, dtype, say)
    end = b"" if eod is None else np.array([eod], dtype).tobytes()

    def encode_shard(documents):
        kept = [
            (ids + end, document_hash(text)) for ids, text in zip(encode(documents), documents, strict=True) if ids
        ]
        hashes = np.fromiter((found for _, found in kept), np.uint64, len(kept))
        return *join_ids([ids for ids, _ in kept], dtype), hashes

    return encode_shard
