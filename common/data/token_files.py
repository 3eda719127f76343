"""Token files: Megatron's memory-mapped .bin and .idx, with a .json beside them that says what they hold.

    .bin    the token ids of all sequences, one after the other
    .idx    b"MMIDIDX\0\0", uint64 version = 1, uint8 type code, uint64 n sequences, uint64 d + 1 document bounds,
            int32 [n] lengths in tokens, int64 [n] positions in the .bin in bytes,
            int64 [d + 1] document bounds (numbers of sequences; document i is bounds[i] up to bounds[i + 1])

Source of the format: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import copy
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.data.ranges import ranges, window
from common.errors import UserError
from common.files import crc32, flush

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
TYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FORMAT = "frugal-tokens-1"  # of the .json
METADATA_TYPES = {  # what the .json must say
    "num_documents": int,
    "num_tokens": int,
    "dtype": str,
    "checksums": dict,
    "tokenizer_name": str,
    "tokenizer_fingerprint": str,
}
COUNTED_TOKENS = 50_000_000  # enough to know how often each token occurs
BLOCK_TOKENS = 1 << 20  # read at once; bounds the memory
WINDOW_SEQUENCES = 1 << 18  # of which the index is read at once
REMEDY = "prepare the data again (--overwrite_cache), or copy the file again"


def token_dtype(vocab_size: int) -> type:
    """Choose the smallest type that Megatron reads too: uint16 up to 65536 ids, int32 above."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def _paths(prefix: str | Path) -> dict[str, Path]:
    return {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "idx", "json")}


def _existing(prefix: str | Path) -> dict[str, Path]:
    """The pair. Raises: UserError: one of them is missing."""
    found = {kind: path for kind, path in _paths(prefix).items() if kind != "json"}
    for path in found.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file; a token file is a pair of .bin and .idx")
    return found


class TokenFileWriter:
    """Write documents to prefix.bin, .idx and .json, in the same memory however many there are; nothing stands under
    these names before finish(). Used as a context manager, it removes what is unfinished.

    Args:
        prefix: path without the ending.
        dtype: numpy integer type of the tokens.
    Attributes:
        num_documents, num_sequences, num_tokens: so far.
    """

    def __init__(self, prefix: str | Path, dtype):
        self.paths = _paths(prefix)
        kept = {kind: Path(f"{prefix}.{kind}") for kind in ("lengths", "counts")}  # until there is an index
        self.unfinished = {kind: Path(f"{path}.tmp") for kind, path in (self.paths | kept).items()}
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_documents = self.num_sequences = self.num_tokens = self.checksum = 0
        self.file, self.lengths, self.counts = (open(self.unfinished[kind], "wb") for kind in ("bin", *kept))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close()
        for path in self.unfinished.values():
            path.unlink(missing_ok=True)

    def _close(self) -> None:
        for file in (self.file, self.lengths, self.counts):
            file.close()

    def append(self, tokens: np.ndarray, lengths, counts=None) -> None:
        """Append documents.

        Args:
            tokens: [sum of lengths] ids of all of them, one after the other.
            lengths: [n] number of tokens of each sequence.
            counts: [d] sequences of each document; None: one.
        """
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        counts = np.ones(len(lengths), "<i4") if counts is None else np.asarray(counts, dtype="<i4")
        self.lengths.write(np.asarray(lengths, dtype="<i4").tobytes())
        self.counts.write(counts.tobytes())
        self.num_documents += len(counts)
        self.num_sequences += len(lengths)
        self.num_tokens += len(tokens)

    def finish(self, metadata: dict) -> dict:
        """Put the three files in place, the .json last.

        Args:
            metadata: what the .json shall say beside the format, the counts and the checksums; tokenizer_name and
                tokenizer_fingerprint at least.
        Returns:
            All that the .json says.
        """
        flush(self.file)
        self._close()
        checksum = 0
        with open(self.unfinished["idx"], "wb") as file:
            for part in self._index():
                file.write(part)
                checksum = zlib.crc32(part, checksum)
            flush(file)
        metadata = {
            "format": FORMAT,
            "unit": "document",
            **metadata,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "dtype": self.dtype.name,
            "checksums": {"bin": self.checksum, "idx": checksum},
        }
        with open(self.unfinished["json"], "wb") as file:
            file.write(json.dumps(metadata, indent=2).encode() + b"\n")
            flush(file)
        self.paths["json"].unlink(missing_ok=True)  # an older one must not vouch for the new .bin
        for kind, path in self.paths.items():
            self.unfinished[kind].replace(path)
        return metadata

    def _index(self) -> Iterator[bytes]:
        """What the .idx holds, in parts."""
        code = next(code for code, dtype in TYPE_CODES.items() if dtype == self.dtype)
        yield HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_documents + 1)
        yield from (part.tobytes() for part in self._blocks("lengths"))
        position = 0
        for part in self._blocks("lengths"):
            sizes = part.astype("<i8") * self.dtype.itemsize
            ends = position + np.cumsum(sizes)
            yield (ends - sizes).astype("<i8").tobytes()
            position = int(ends[-1])
        bound = 0
        yield np.zeros(1, "<i8").tobytes()
        for part in self._blocks("counts"):
            bounds = bound + np.cumsum(part, dtype="<i8")
            yield bounds.tobytes()
            bound = int(bounds[-1])

    def _blocks(self, kind: str) -> Iterator[np.ndarray]:
        with open(self.unfinished[kind], "rb") as file:
            while len(part := np.fromfile(file, "<i4", BLOCK_TOKENS)):
                yield part


class _Index:
    """A .idx in a memory map, checked as far as its header goes.

    Args:
        path: Path.
    Attributes:
        dtype: of the tokens; lengths, positions, documents: as the head of this file says, not aligned (the header
            has 34 bytes).
    Raises:
        UserError: it is not one.
    """

    def __init__(self, path: Path):
        self.path, size = path, path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{path}: not a Megatron index (MMIDIDX); check the path, or prepare the data again")
        _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
        if version != VERSION or code not in TYPE_CODES:
            raise UserError(f"{path}: version {version}, type code {code}: not integer tokens of version {VERSION}")
        if size != HEADER.size + 12 * num_sequences + 8 * num_bounds:
            raise UserError(f"{path}: its size does not fit its {num_sequences} sequences (cut off?); {REMEDY}")
        self.dtype = np.dtype(TYPE_CODES[code]).newbyteorder("<")
        lengths_end, positions_end = (HEADER.size + bytes_each * num_sequences for bytes_each in (4, 12))
        whole = np.asarray(np.memmap(path, np.uint8, "r"))
        self.lengths = whole[HEADER.size : lengths_end].view("<i4")
        self.positions = whole[lengths_end:positions_end].view("<i8")
        self.documents = whole[positions_end:].view("<i8")

    def damaged(self) -> UserError:
        return UserError(f"{self.path}: damaged (its positions make no sense); {REMEDY}")


def verify(prefix: str | Path, metadata: dict) -> None:
    """Compare .bin and .idx with the checksums of their .json.

    Raises:
        UserError: a file is missing, or not the one that was written.
    """
    for kind, path in _existing(prefix).items():
        if crc32(path) != metadata["checksums"][kind]:
            raise UserError(f"{path}: damaged (its checksum differs from the .json's); {REMEDY}")


def document_windows(prefix: str | Path) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of parts that follow each other, of a bounded index each, for TokenFile's documents."""
    bounds = _Index(_paths(prefix)["idx"]).documents
    first, end = 0, len(bounds) - 1
    while first < end:
        last = int(np.searchsorted(bounds, bounds[first] + WINDOW_SEQUENCES, side="right")) - 1
        last = min(max(last, first + 1), first + WINDOW_SEQUENCES, end)
        yield first, last
        first = last


class TokenFile:
    """A memory-mapped pair of .bin and .idx, Frugal's or Megatron's.

    Args:
        prefix: path without the ending.
        documents: (first, last): only the index of these is read, and they are what it seems to hold. None: all.
    Attributes:
        tokens: memory map [T] of token ids, always all.
        starts: int64 [n] number of the first token of each sequence.
        lengths: int32 [n] tokens of each sequence.
        documents: int64 [d + 1] document i holds the sequences from documents[i] up to documents[i + 1].
        first_sequence: int, number of the first sequence in the whole file.
        metadata: what the .json says, None where there is none.
    Raises:
        UserError: a file is missing, cut off, or not of this format.
    """

    def __init__(self, prefix: str | Path, documents: tuple[int, int] | None = None):
        self.prefix = str(prefix)
        self.paths = _paths(prefix) | _existing(prefix)
        self.metadata = self._read_metadata()
        index = _Index(self.paths["idx"])
        itemsize, size = index.dtype.itemsize, self.paths["bin"].stat().st_size
        if size == 0 or len(index.lengths) == 0:
            raise UserError(f"{self.paths['bin']}: holds no tokens; {REMEDY}")
        first, last = documents or (0, len(index.documents) - 1)
        bounds = index.documents[first : last + 1].copy()
        sound = len(bounds) > 1 and index.documents[0] == 0 and index.documents[-1] == len(index.lengths)
        if not sound or bounds[0] < 0 or bounds[-1] > len(index.lengths) or (np.diff(bounds) < 0).any():
            raise index.damaged()
        self.first_sequence = int(bounds[0])
        self.documents = bounds - bounds[0]
        positions = index.positions[bounds[0] : bounds[-1]]
        self.lengths = index.lengths[bounds[0] : bounds[-1]].copy()
        if (positions > size - self.lengths * np.int64(itemsize)).any():
            raise UserError(f"{self.paths['bin']}: shorter than its index says (cut off?); {REMEDY}")
        if (positions < 0).any() or (positions % itemsize).any() or (self.lengths < 0).any():
            raise index.damaged()
        self.starts = positions // itemsize
        if self.metadata is not None and documents is None:
            self._compare_with_metadata(index.dtype)
        self.tokens = np.memmap(self.paths["bin"], dtype=index.dtype, mode="r", shape=(size // itemsize,))

    def _read_metadata(self) -> dict | None:
        path = self.paths["json"]
        if not path.exists():
            return None
        try:
            metadata = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: does not describe a token file ({error}); {REMEDY}") from error
        said = metadata.get("format") if isinstance(metadata, dict) else None
        if said != FORMAT:
            raise UserError(f"{path}: does not describe a token file of format {FORMAT} (but {said}); {REMEDY}")
        wrong = [key for key, type_ in METADATA_TYPES.items() if not isinstance(metadata.get(key), type_)]
        if wrong or not all(isinstance(metadata["checksums"].get(kind), int) for kind in ("bin", "idx")):
            raise UserError(f"{path}: {(wrong or ['checksums'])[0]} is missing or of the wrong type; {REMEDY}")
        return metadata

    def _compare_with_metadata(self, dtype: np.dtype) -> None:
        """The checksums are compared once in a while; what the index says, each time."""
        facts = {
            "num_documents": self.num_documents,
            "num_tokens": int(self.lengths.sum(dtype=np.int64)),
            "dtype": dtype.name,
        }
        for key, fact in facts.items():
            if self.metadata[key] != fact:
                raise UserError(
                    f"{self.paths['idx']}: {key} is {fact}, but {self.metadata[key]} by the .json beside it; {REMEDY}"
                )

    @property
    def num_documents(self) -> int:
        """Number of documents d."""
        return len(self.documents) - 1

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [d]."""
        return np.diff(np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[self.documents])

    def verify(self) -> None:
        """Compare both files with the checksums in the .json; without one there is nothing to compare with.

        Raises:
            UserError: a file is not the one that was written.
        """
        if self.metadata is not None:
            verify(self.prefix, self.metadata)

    def subset(self, documents: np.ndarray) -> "TokenFile":
        """Return a view of some documents, in their order in the file; the tokens are shared.

        Args:
            documents: numbers of the documents, each at most once.
        """
        chosen = np.zeros(self.num_documents, bool)
        chosen[documents] = True
        sequences = np.diff(self.documents)  # in each document
        view = copy.copy(self)
        kept = np.repeat(chosen, sequences)
        view.starts, view.lengths = self.starts[kept], self.lengths[kept]
        view.documents = np.concatenate([[0], np.cumsum(sequences[chosen])])
        return view

    def token_counts(self, size: int, most: int = COUNTED_TOKENS) -> np.ndarray:
        """Count how often each token occurs in these documents, which in a view are not all of the file's.

        Args:
            size: int, above every token.
            most: int; of longer text the first so many tokens are counted.
        Returns:
            int64 [size].
        """
        bounds = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        total = min(most, int(bounds[-1]))
        counts = np.zeros(size, np.int64)
        for first in range(0, total, BLOCK_TOKENS):
            last = min(first + BLOCK_TOKENS, total)
            sequence, skipped, lengths = window(bounds, first, last)
            starts = self.starts[sequence] + skipped
            if (starts[1:] == starts[:-1] + lengths[:-1]).all():  # nothing left out in between, as in a whole file
                tokens = self.tokens[starts[0] : starts[0] + last - first]
            else:
                tokens = self.tokens[ranges(starts, lengths)]
            counts += np.bincount(tokens, minlength=size)
        return counts
