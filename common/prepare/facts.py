"""What is known of a shard's documents, in columns of one file: written as it comes, sorted in bounded memory.

For each document its source (uint16, a number in the .json's "inputs"), characters and words (uint32); the hashes of
the texts (uint64, ascending) and the document that each belongs to (uint32); where they were asked for, the same of
every band of near-duplicates, and the hashes of the lines with the sequence that each belongs to.
"""

import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from common.files import flush
from common.prepare.encoding import NO_LINE

BLOCK = 1 << 18  # entries that are read or sorted at once
MOST_BUCKETS = 500  # files that are open at once
PLAIN = {"sources": "<u2", "characters": "<u4", "words": "<u4"}
HASHED = np.dtype([("value", "<u8"), ("place", "<u4")])


class FactsWriter:
    """Write a .facts file, which has its name when it is whole; a context manager that leaves nothing else behind.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path):
        self.path, self.unfinished = path, Path(f"{path}.tmp")
        self.stack = ExitStack()
        self.stack.callback(self.unfinished.unlink, missing_ok=True)
        self.plain = {name: self._scratch(dtype) for name, dtype in PLAIN.items()}
        self.hashed = {}  # (the name of the values, that of their places): what comes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    def _scratch(self, dtype) -> "_Scratch":
        return _Scratch(self.stack, self.path.parent, dtype)

    def append(self, columns: dict) -> None:
        """Add what is known of the next documents. Args: columns: as make_shard_encoder gives them."""
        for name, scratch in self.plain.items():
            scratch.append(columns[name])
        hashed = {("hashes", "documents"): columns["hashes"]}
        for number, band in enumerate(columns.get("bands", ())):
            hashed[f"band {number}", f"documents of band {number}"] = band
        if "lines" in columns:
            hashed["lines", "sequences"] = columns["lines"]
        for names, values in hashed.items():
            if names not in self.hashed:
                self.hashed[names] = self._scratch("<u8")
            self.hashed[names].append(values)

    def finish(self) -> dict:
        """Write the file.

        Returns:
            dict for FinishedShard: its checksum, and "columns": name, type and length of each, in their order.
        """
        columns, checksum = [], 0
        with open(self.unfinished, "wb") as file:

            def put(name, dtype, blocks):
                nonlocal checksum
                size = 0
                for block in blocks:
                    data = np.ascontiguousarray(block, dtype).data.cast("B")
                    file.write(data)
                    checksum, size = zlib.crc32(data, checksum), size + len(block)
                columns.append([name, dtype, size])

            for name, scratch in self.plain.items():
                put(name, PLAIN[name], scratch.blocks())
            for (values, places), scratch in self.hashed.items():
                with ExitStack() as stack:
                    order = _Scratch(stack, self.path.parent, "<u4")
                    put(values, "<u8", self._ascending(scratch, order, skipped=NO_LINE if values == "lines" else None))
                    put(places, "<u4", order.blocks())
            flush(file)
        self.unfinished.replace(self.path)
        return {"crc32": checksum, "columns": columns}

    def _ascending(self, scratch: "_Scratch", order: "_Scratch", skipped: int | None) -> Iterator[np.ndarray]:
        """Yield the values in ascending order; where each of them was is appended to `order`.

        Hashes are spread evenly, so that buckets of equal ranges are of about equal size.
        """
        buckets = min(-(-scratch.size // BLOCK), MOST_BUCKETS)
        width = np.uint64(2**64 // buckets + 1) if buckets > 1 else None
        with ExitStack() as stack:
            files = [_Scratch(stack, self.path.parent, HASHED) for _ in range(buckets)]
            at = 0
            for values in scratch.blocks():
                entries = np.empty(len(values), HASHED)
                entries["value"], entries["place"] = values, np.arange(at, at + len(values))
                at += len(values)
                if skipped is not None:
                    entries = entries[values != skipped]
                if buckets == 1:
                    files[0].append(entries)
                    continue
                bucket = (entries["value"] // width).astype(np.uint16)
                entries = entries[np.argsort(bucket, kind="stable")]
                ends = np.cumsum(np.bincount(bucket, minlength=buckets))
                for file, part in zip(files, np.split(entries, ends[:-1]), strict=True):
                    file.append(part)
            for file in files:
                entries = file.whole()
                entries = entries[np.argsort(entries["value"], kind="stable")]
                order.append(entries["place"])
                yield entries["value"]


class _Scratch:
    """Numbers on the disk that are gone with the process: the file has no name.

    Args:
        stack: ExitStack that closes it; folder: Path; dtype: of numpy.
    """

    def __init__(self, stack: ExitStack, folder: Path, dtype):
        self.file = stack.enter_context(tempfile.TemporaryFile(dir=folder, prefix=".scratch"))
        self.dtype, self.size = np.dtype(dtype), 0

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).data.cast("B") if len(values) else b"")
        self.size += len(values)

    def blocks(self) -> Iterator[np.ndarray]:
        self.file.seek(0)
        while len(data := self.file.read(BLOCK * self.dtype.itemsize)):
            yield np.frombuffer(data, self.dtype)

    def whole(self) -> np.ndarray:
        self.file.seek(0)
        return np.frombuffer(self.file.read(), self.dtype)
