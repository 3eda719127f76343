"""Shards: which part of the input each of them reads, and what one that is finished has on the disk.

A shard is shards/NNNNN.{bin,idx,json}, a token file of all its documents, and NNNNN.facts: uint64 [n] the hashes of
their texts, ascending; uint32 [n] the number of the document that each belongs to; uint16 [n] each document's source,
a number in the .json's list. The .json comes last and says with which settings; nothing counts without it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.token_files import TokenFile
from common.errors import UserError
from common.files import crc32, flush

FACTS = ("<u8", "<u4", "<u2")  # hashes, documents, sources


@dataclass(frozen=True)
class Shard:
    """A part of the input.

    number: from 0. parts: (file, first, step): of the file the documents number first, first + step, ... from 0.
    """

    number: int
    parts: tuple[tuple[Path, int, int], ...]

    @property
    def name(self):
        """Of its files, without folder and ending."""
        return f"{self.number:05d}"


def plan_shards(files, count=None):
    """Deal files to shards, or, where there are fewer files than shards, each file's documents.

    Args:
        files: list of Path; count: shards, None for one of each file.
    Returns:
        list of Shard.
    """
    count = count or len(files)
    if count <= len(files):
        return [Shard(number, tuple((path, 0, 1) for path in files[number::count])) for number in range(count)]
    sharing = [len(range(at, count, len(files))) for at in range(len(files))]  # shards that read this file
    return [
        Shard(number, ((files[at], number // len(files), sharing[at]),))
        for number in range(count)
        for at in [number % len(files)]
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

    def write_facts(self, hashes, sources):
        """Write what is known of the documents beside their tokens.

        Args:
            hashes: uint64 [n] of their texts, in their order; sources: uint16 [n].
        Returns:
            the CRC-32 of the file.
        """
        order = np.argsort(hashes, kind="stable")
        unfinished = Path(f"{self.facts_in}.tmp")
        with open(unfinished, "wb") as file:
            for column, dtype in zip((hashes[order], order, sources), FACTS, strict=True):
                file.write(column.astype(dtype).tobytes())
            flush(file)
        checksum = crc32(unfinished)
        unfinished.replace(self.facts_in)
        return checksum

    def open(self):
        """Open a finished shard whose files are what was written.

        Returns:
            FinishedShard; None for one without documents.
        Raises:
            UserError: a file is damaged or missing.
        """
        if not json.loads(self.described_in.read_bytes())["num_documents"]:
            return None
        tokens = TokenFile(self.prefix)
        tokens.verify()
        number, at, columns = tokens.num_documents, 0, []
        if not self.facts_in.exists() or crc32(self.facts_in) != tokens.metadata.get("facts"):
            raise UserError(f"{self.facts_in}: damaged or missing; remove {self.described_in} and tokenize again")
        for dtype in map(np.dtype, FACTS):
            columns.append(np.memmap(self.facts_in, dtype, "r", offset=at, shape=(number,)))
            at += number * dtype.itemsize
        return FinishedShard(tokens, *columns)


@dataclass(frozen=True)
class FinishedShard:
    """tokens: TokenFile; hashes, documents, sources: memory maps as described above."""

    tokens: TokenFile
    hashes: np.ndarray
    documents: np.ndarray
    sources: np.ndarray


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
