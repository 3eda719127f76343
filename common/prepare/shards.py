"""Shards: which part of the text each of them reads, and what one that is finished has on the disk.

A shard is shards/NNNNN.{bin,idx,json}, a token file of all its documents, and NNNNN.facts with what is known of each
of them (common/prepare/facts.py). The .json comes last and says with which settings; nothing counts without it.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.token_files import TokenFile, document_windows, verify
from common.errors import UserError
from common.files import crc32


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
        verify(self.prefix, described)
        if not self.facts_in.exists() or crc32(self.facts_in) != described["facts"]["crc32"]:
            raise UserError(f"{self.facts_in}: damaged or missing; remove {self.described_in} and tokenize again")
        return FinishedShard(self.prefix, self.facts_in, described)


class Window(NamedTuple):
    """Some documents of a shard that follow each other.

    tokens: TokenFile of these alone; documents, sequences: slices of their numbers in the shard.
    """

    tokens: TokenFile
    documents: slice
    sequences: slice


class FinishedShard:
    """A shard on the disk; what is asked for is mapped into memory.

    Args:
        prefix: of the token file; facts_in: Path; described: what the .json says.
    """

    def __init__(self, prefix, facts_in, described):
        self.prefix, self.facts_in, self.described = prefix, facts_in, described
        self.num_documents = described["num_documents"]

    def windows(self):
        """Yield the documents in parts of bounded size, as Window."""
        for first, last in document_windows(self.prefix):
            tokens = TokenFile(self.prefix, (first, last))
            sequences = slice(tokens.first_sequence, tokens.first_sequence + len(tokens.lengths))
            yield Window(tokens, slice(first, last), sequences)

    def column(self, wanted):
        """A memory map of a column (see common/prepare/facts.py), None where there is none of this name."""
        at = 0
        for name, dtype, size in self.described["facts"]["columns"]:
            if name == wanted:
                return np.memmap(self.facts_in, dtype, "r", offset=at, shape=(size,)) if size else np.empty(0, dtype)
            at += np.dtype(dtype).itemsize * size
        return None


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
