"""Shards: which part of the text each of them reads, and what one that is finished has on the disk.

A shard is shards/NNNNN.{bin,idx,json}, a token file of all its documents, and NNNNN.facts with columns: for each
document its source (uint16, a number in the .json's "inputs"), characters and words (uint32); the hashes of the texts
(uint64, ascending) and the document that each belongs to (uint32); where they were asked for, the same of every band
of near-duplicates, and the hashes of the lines with the sequence that each belongs to. The .json comes last and says
with which settings; nothing counts without it.
"""

import json
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.token_files import TokenFile
from common.errors import UserError
from common.files import crc32, flush
from common.prepare.encoding import NO_LINE


@dataclass(frozen=True)
class Shard:
    """A part of the text.

    number: from 0. parts: (input, first, step): of the input (common.prepare.inputs) the documents number first,
    first + step, ... from 0.
    """

    number: int
    parts: tuple[tuple[object, int, int], ...]

    @property
    def name(self):
        """Of its files, without folder and ending."""
        return f"{self.number:05d}"


def plan_shards(inputs, count=None):
    """Deal inputs to shards, or, where there are fewer of them than shards, each one's documents.

    Args:
        inputs: list; count: shards, None for one of each input.
    Returns:
        list of Shard.
    """
    count = count or len(inputs)
    if count <= len(inputs):
        return [Shard(number, tuple((one, 0, 1) for one in inputs[number::count])) for number in range(count)]
    sharing = [len(range(at, count, len(inputs))) for at in range(len(inputs))]  # shards that read this one
    return [
        Shard(number, ((inputs[at], number // len(inputs), sharing[at]),))
        for number in range(count)
        for at in [number % len(inputs)]
    ]


class ShardFiles:
    """What lies on the disk for a shard.

    Args:
        folder: Path; shard: Shard.
    """

    def __init__(self, folder, shard):
        self.shard, self.prefix = shard, folder / shard.name
        self.described_in = Path(f"{self.prefix}.json")
        self.facts_in = Path(f"{self.prefix}.facts")

    def is_finished(self, settings):
        """Whether it is whole and was made with these settings (a dict of JSON values).

        Raises:
            UserError: it was made with others.
        """
        if not self.described_in.exists():
            return False
        try:
            found = json.loads(self.described_in.read_bytes())["settings"]
        except (ValueError, KeyError, TypeError):
            return False  # damaged: made again
        refuse_other_settings(self.described_in, found, settings)
        return True

    def write_facts(self, columns):
        """Write what is known of the documents beside their tokens.

        Args:
            columns: as make_shard_encoder gives them, of the whole shard.
        Returns:
            dict for open(): the checksum of the file and where its columns are.
        """
        arrays = {name: columns[name] for name in ("sources", "characters", "words")}
        arrays["hashes"], arrays["documents"] = _ordered(columns["hashes"])
        for number, band in enumerate(columns.get("bands", ())):
            arrays[f"band {number}"], arrays[f"documents of band {number}"] = _ordered(band)
        if "lines" in columns:
            sequences = np.flatnonzero(columns["lines"] != NO_LINE)
            arrays["lines"], order = _ordered(columns["lines"][sequences])
            arrays["sequences"] = sequences[order].astype(np.uint32)
        unfinished, checksum = Path(f"{self.facts_in}.tmp"), 0
        try:
            with open(unfinished, "wb") as file:
                for array in arrays.values():
                    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
                    file.write(data)
                    checksum = zlib.crc32(data, checksum)
                flush(file)
            unfinished.replace(self.facts_in)
        finally:
            unfinished.unlink(missing_ok=True)
        return {"crc32": checksum, "columns": [[name, array.dtype.str, len(array)] for name, array in arrays.items()]}

    def open(self):
        """Open a finished shard whose files are what was written.

        Returns:
            FinishedShard; None for one without documents.
        Raises:
            UserError: a file is damaged or missing.
        """
        described = json.loads(self.described_in.read_bytes())
        if not described["num_documents"]:
            return None
        TokenFile(self.prefix).verify()
        if not self.facts_in.exists() or crc32(self.facts_in) != described["facts"]["crc32"]:
            raise UserError(f"{self.facts_in}: damaged or missing; remove {self.described_in} and tokenize again")
        return FinishedShard(self.prefix, self.facts_in, described)


class FinishedShard:
    """A shard on the disk; what is asked for is mapped into memory.

    Args:
        prefix: of the token file; facts_in: Path; described: what the .json says.
    """

    def __init__(self, prefix, facts_in, described):
        self.prefix, self.facts_in, self.described = prefix, facts_in, described
        self.num_documents = described["num_documents"]

    def tokens(self):
        """The TokenFile, whose index takes memory as long as it is kept."""
        return TokenFile(self.prefix)

    def column(self, wanted):
        """A memory map of a column (see the head of this file), None where there is none of this name."""
        at = 0
        for name, dtype, size in self.described["facts"]["columns"]:
            if name == wanted:
                return np.memmap(self.facts_in, dtype, "r", offset=at, shape=(size,)) if size else np.empty(0, dtype)
            at += np.dtype(dtype).itemsize * size
        return None


def _ordered(values):
    """(the values ascending, uint32 where each of them was)."""
    order = np.argsort(values, kind="stable")
    return values[order], order.astype(np.uint32)


@contextmanager
def writing(where):
    """Turn what a full or failing disk raises into one line. Args: where: Path. Raises: UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: cannot be written ({error.strerror or error}); make room and start again: what is done stays"
        ) from error


def refuse_other_settings(where, found, wanted):
    """Raise UserError where settings (dicts of JSON values) differ, with the first that does."""
    for name in wanted:
        if found.get(name) != wanted[name]:
            change = f"{_brief(found.get(name))}, now {_brief(wanted[name])}"
            raise UserError(
                f"{where}: made with another {name} ({change}); give another --output_dir, or --overwrite_output_dir "
                "to make everything again"
            )


def _brief(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
