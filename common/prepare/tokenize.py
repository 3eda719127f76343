"""One shard: read it, tokenize it with all cores, write it whole or not at all."""

import json
import time
from contextlib import closing

import filelock
import numpy as np

from common.data.blocks import BLOCK_SIZE, BadRecords
from common.data.token_files import TokenFileWriter, token_dtype
from common.errors import UserError
from common.prepare.encoding import Dropped
from common.prepare.facts import FactsWriter
from common.prepare.needs import shard_bytes
from common.prepare.shards import ShardFiles, writing
from common.progress import Progress, format_duration, format_times


def tokenize(shards, folder, prepared_with, args, workers, say):
    """Tokenize shards one after the other, as write_shard does. Args: shards: list of Shard."""
    began, done = time.monotonic(), 0
    sizes = list(map(shard_bytes, shards))
    for number, shard in enumerate(shards, start=1):
        if not write_shard(shard, folder, prepared_with, args, workers, say):
            began = began if done else time.monotonic()
            continue
        done += sizes[number - 1]
        if number < len(shards) and done:
            left = sum(sizes[number:]) / done * (time.monotonic() - began)
            say(f"{number} of {len(shards)} shards, about {format_duration(left)} left")


def write_shard(shard, folder, prepared_with, args, workers, say):
    """Tokenize a shard, unless that is done.

    Args:
        shard: common.prepare.shards.Shard; folder: Path of the shards.
        prepared_with: common.prepare.settings.Settings.
        args: PrepareArguments; workers: common.data.workers.Workers; say: function that prints a line.
    Returns:
        bool: whether there was anything to do.
    Raises:
        UserError: unreadable input, a shard made with other settings, another process at work on this one.
    """
    files, settings = ShardFiles(folder, shard), prepared_with.of_shard(shard)
    try:
        with filelock.FileLock(folder / f".{shard.name}.lock", timeout=0):
            if files.is_finished(settings):
                say(f"shard {shard.number}: finished already")
                return False
            with writing(files.prefix):
                _write(shard, files, settings, prepared_with, args, workers, say)
            if args.remove_downloads:
                for one, *_ in shard.parts:
                    one.release()
            return True
    except filelock.Timeout:
        raise UserError(f"shard {shard.number}: another process is preparing it; wait, or give other shards") from None


def _write(shard, files, settings, prepared_with, args, workers, say):
    bad_records, meter, dropped = BadRecords(args.max_bad_records), _Meter(shard), Dropped()
    inputs = {}  # numbers by (input, label)

    def batches():
        batch, size = [], 0
        for block, source in shard_blocks(shard, args, bad_records, meter.bar.note):
            batch.append((block, source))
            size += block.size
            if size >= BLOCK_SIZE:
                yield batch
                batch, size = [], 0
        yield batch

    results = workers.map(batches(), (prepared_with.how,), meter.bar.note)
    totals = dict.fromkeys(("characters", "words"), 0)
    token_files = TokenFileWriter(files.prefix, token_dtype(prepared_with.vocab_size))
    with closing(meter.bar), token_files as writer, FactsWriter(files.facts_in) as facts_writer:
        for found in results:
            for where, what in found["bad_records"]:
                bad_records.add(where, what)
            numbers = [inputs.setdefault(one, len(inputs)) for one in found["inputs"]]
            found["sources"] = np.array(numbers, np.uint16)[found["sources"]]
            for reason, text in found["left_out"]:
                dropped.add(reason, [text])
            writer.append(found["tokens"], found["lengths"], found["counts"])
            facts_writer.append(found)
            for name in totals:
                totals[name] += int(found[name].sum(dtype=np.int64))
            meter.show(totals["characters"], writer.num_documents)
        facts = totals | {
            "settings": settings,
            "bad_records": bad_records.count,
            "dropped": dropped.reasons,
            "seconds": round(meter.seconds(), 2),
            "inputs": [list(one) for one in inputs],
            "facts": facts_writer.finish(),
        }
        written = writer.finish(prepared_with.of_shard_file() | facts)
    line = {name: written[name] for name in ("num_documents", "num_tokens", "characters", "bad_records", "seconds")}
    with open(files.prefix.parent / "log.jsonl", "a") as log:
        log.write(json.dumps({"shard": shard.number} | line) + "\n")
    for reason, (count, _) in dropped.reasons.items():
        say(f"shard {shard.number}: left out {count:,}: {reason}")
    say(
        f"shard {shard.number}: {written['num_documents']:,} documents, {meter.speed()}, "
        f"{written['num_tokens'] / 1e6:.2f} M tokens"
    )


class _Meter:
    """How far a shard is, on a bar or in a line now and then."""

    def __init__(self, shard):
        self.bar = Progress(True, f"shard {shard.number}")
        self.expected = shard_bytes(shard)
        self.began = time.monotonic()
        self.characters = 0

    def show(self, characters, documents):
        """Args: characters, documents: so far."""
        self.characters = characters
        share = self.characters / self.expected if self.expected else 0.0
        left = self.seconds() * (1 / share - 1) if 0 < share < 1 else None
        self.bar.show(share, f"{format_times(self.seconds(), left)}, {documents:,} documents, {self.speed()}")

    def seconds(self):
        return time.monotonic() - self.began

    def speed(self):
        size = self.characters / 1e6
        return f"{size:,.1f} MB of text, {size / self.seconds():.1f} MB/s"


def shard_blocks(shard, args, bad_records, say):
    """Yield (block of documents as read_blocks yields them, number of the input) of a shard.

    Args:
        shard: Shard; args: PrepareArguments; bad_records: BadRecords; say: function that prints a line.
    """
    for one, first, step in shard.parts:
        one.fetch(say)
        for block in one.blocks(args, bad_records, first, step):
            yield block, one.source
