"""Rows of fixed length from documents of any length. Which tokens make up row n is fixed once, here.

T tokens in the file, n documents, R rows, G segments, B rows in a batch, S tokens in a row.

A segment is a piece of one document with its frame, [CLS] and [SEP] for instance; a row holds whole segments.
"""

import json
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.ranges import ranges, window
from common.errors import UserError
from common.files import flush

BLOCK_SEGMENTS = 1 << 20  # packed together; beside the documents' lengths, planning needs memory for one block
PLAN_FORMAT = 3
PLAN_FILES = {"row_ends": "<i8", "row_tokens": "<i4", "starts": "<i8", "lengths": "<i4"}  # name.bin and its dtype


@dataclass(frozen=True)
class Frame:
    """Special tokens around every segment, None where there is none, and what fills a row."""

    first_id: int | None
    last_id: int | None
    pad_id: int

    @classmethod
    def for_masked(cls, tokenizer):
        """[CLS] segment [SEP]."""
        return cls(tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)

    @classmethod
    def for_causal(cls, tokenizer):
        """The token that begins a text, or where there is none the one that ends it, in front of every segment."""
        first, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        return cls(end if first is None else first, None, end if pad is None else pad)

    @property
    def size(self):
        """Special tokens in a segment."""
        return (self.first_id is not None) + (self.last_id is not None)


def histogram_pack(lengths, capacity):
    """Best-fit-decreasing bin packing by length counts, so that its cost does not depend on the number of items.

    Args:
        lengths: [G] integers in [1, capacity].
        capacity: int.
    Returns:
        (order, row_ends): order is [G] int64, item numbers row by row; row_ends is [R] int64, cumulative item counts.
        Items of equal length are taken in their given order.
    Source: the histogram idea of Krell et al. 2021 (arXiv:2107.02027), with best fit instead of shortest-pack-first.
    """
    lengths = np.asarray(lengths)
    counts = np.bincount(lengths, minlength=capacity + 1)
    open_rows = [[] for _ in range(capacity + 1)]  # by free space: [(lengths in the row, number of such rows)]
    for length in range(capacity, 0, -1):
        left = int(counts[length])
        for space in range(length, capacity):  # fullest row that still fits
            shapes, open_rows[space] = open_rows[space], []
            for shape, number in shapes:
                left, placed = _place(shape, number, space, length, left)
                for free, row in placed:
                    open_rows[free].append(row)
        _, placed = _place((), left, capacity, length, left)  # nothing open fits: rows of this length alone
        for free, row in placed:
            if row[0]:
                open_rows[free].append(row)
    by_length = np.argsort(lengths, kind="stable")
    next_item = np.concatenate([[0], np.cumsum(counts)[:-1]])
    order, sizes = [], []
    for shape, number in (row for rows in open_rows for row in rows):
        items = np.empty((number, len(shape)), dtype=np.int64)
        for column, length in enumerate(shape):
            items[:, column] = by_length[next_item[length] : next_item[length] + number]
            next_item[length] += number
        order.append(items.ravel())
        sizes.append(np.full(number, len(shape), dtype=np.int64))
    return np.concatenate(order), np.cumsum(np.concatenate(sizes))


def _place(shape, number, space, length, items):
    """Put up to `items` items of one length into `number` equal rows, filling one row after another.

    Args:
        shape: lengths already in each of these rows; space: what is free in each.
    Returns:
        (items left over, [(free space, (shape, number))] of the resulting rows).
    """
    fits = space // length
    full = min(number, items // fits)
    rest = items - full * fits if full < number else 0
    rest = min(rest, fits - 1)
    untouched = number - full - (rest > 0)
    rows = [(space - fits * length, (shape + (length,) * fits, full))] if full else []
    if rest:
        rows.append((space - rest * length, (shape + (length,) * rest, 1)))
    if untouched:
        rows.append((space, (shape, untouched)))
    return items - full * fits - rest, rows


class DocumentRows:
    """Rows in which several documents lie side by side without seeing each other.

    Args:
        token_file: common.data.token_files.TokenFile, documents without special tokens.
        frame: Frame.
        seq_length: S.
        cache_folder: where the plan is kept, memory-mapped, for the next run.
    Attributes:
        full: whether next to nothing in the rows is padding.
    """

    full = True

    def __init__(self, token_file, frame, seq_length, cache_folder):
        self.tokens, self.frame, self.seq_length = np.asarray(token_file.tokens), frame, seq_length
        folder = Path(cache_folder) / f"rows-{seq_length}-{frame.size}-v{PLAN_FORMAT}"
        if not _is_whole(folder):
            _write_plan(token_file, seq_length, frame.size, folder)
        # memory maps, but as plain arrays: what is taken out of a np.memmap is one, too, which costs time
        load = lambda name: np.asarray(np.memmap(folder / f"{name}.bin", PLAN_FILES[name], mode="r"))  # noqa: E731
        self.row_ends, self.row_tokens = load("row_ends"), load("row_tokens")
        self.starts, self.lengths = load("starts"), load("lengths")

    def __len__(self):
        return len(self.row_ends)

    def text_tokens(self, rows, _keys=None):
        """[B] int64: tokens of text in each row, special tokens and padding not counted."""
        first, last = self._segment_range(rows)
        return self.row_tokens[rows].astype(np.int64) - self.frame.size * (last - first)

    def next_tokens(self, rows):
        """[B] int64: tokens in each row that another one of their document follows."""
        first, last = self._segment_range(rows)
        return self.row_tokens[rows].astype(np.int64) - (last - first)

    def real_tokens(self, rows, _keys=None):
        """[B] int64: tokens in each row, special tokens included, padding not."""
        return self.row_tokens[rows].astype(np.int64)

    def build(self, rows, _keys=None):
        """The content of some rows.

        Args:
            rows: [B] int64 row numbers.
        Returns:
            dict of [B, S]: input_ids, position_ids, document_ids int64 (0 = padding), is_text bool.
        """
        first, last = self._segment_range(rows)
        segment = ranges(first, last - first)  # [g] segments of these rows, row by row
        pieces = last - first + 1  # in each row: its segments, then its padding
        padding = np.zeros(len(segment) + len(pieces), bool)
        padding[np.cumsum(pieces) - 1] = True
        text = ~padding
        document = ranges(np.ones_like(pieces), pieces)
        document[padding] = 0
        sizes = np.empty(len(padding), np.int64)
        sizes[text] = self.lengths[segment] + self.frame.size
        sizes[padding] = self.seq_length - self.row_tokens[rows]
        ends = np.cumsum(sizes)
        begins = ends - sizes  # in these rows laid end to end
        shift = np.zeros_like(begins)
        leading = self.frame.first_id is not None
        shift[text] = self.starts[segment] - (begins[text] + leading)  # from there to the place in the file

        place = np.arange(len(rows) * self.seq_length)
        input_ids = self.tokens.take(place + np.repeat(shift, sizes), mode="clip").astype(np.int64)
        position_ids = place - np.repeat(begins, sizes)
        document_ids = np.repeat(document, sizes)
        is_text = np.ones(len(place), bool)
        unused = ranges(begins[padding], sizes[padding])
        position_ids[unused] = 0
        frame = self.frame
        for value, places in ((frame.first_id, begins[text]), (frame.last_id, ends[text] - 1), (frame.pad_id, unused)):
            if value is not None:
                input_ids[places] = value
                is_text[places] = False
        flat = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "document_ids": document_ids,
            "is_text": is_text,
        }
        return {name: array.reshape(len(rows), self.seq_length) for name, array in flat.items()}

    def _segment_range(self, rows):
        rows = np.asarray(rows)
        first = np.where(rows > 0, self.row_ends[rows - 1], 0)
        return first, self.row_ends[rows]


class ConcatenatedRows:
    """Rows cut from one stream of documents in their frames, one behind the other, as Hugging Face's examples do it.

    What is left after the last full row is dropped, as there. Arguments as DocumentRows, without a plan to keep.
    """

    full = True

    def __init__(self, token_file, frame, seq_length):
        self.tokens, self.frame, self.seq_length = np.asarray(token_file.tokens), frame, seq_length
        self.starts = np.asarray(token_file.starts)
        self.lengths = np.asarray(token_file.lengths, dtype=np.int64)
        self.stream_starts = np.concatenate([[0], np.cumsum(self.lengths + frame.size)])  # [n + 1]
        self.text_before = np.concatenate([[0], np.cumsum(self.lengths)])
        # [R + 1]: the document in which each row begins; searching for it, row by row, would take a fifth of the time
        begun = np.bincount(-(-self.stream_starts // seq_length), minlength=len(self) + 1)[: len(self) + 1]
        self.first_documents = np.cumsum(begun) - 1

    def __len__(self):
        return int(self.stream_starts[-1]) // self.seq_length

    def real_tokens(self, rows, _keys=None):
        """[B] int64: tokens in each row."""
        return np.full(len(rows), self.seq_length)

    def text_tokens(self, rows, _keys=None):
        """[B] int64: tokens of text in each row."""
        rows = np.asarray(rows)
        return self._text_before(rows + 1) - self._text_before(rows)

    def next_tokens(self, rows):
        """[B] int64: tokens in each row that another one follows."""
        return np.full(len(rows), self.seq_length - 1)

    def build(self, rows, _keys=None):
        """As DocumentRows.build; positions run through the row and document_ids are 1."""
        rows = np.asarray(rows)
        starts = rows * self.seq_length  # in the stream
        first, following = self.first_documents[rows], self.first_documents[rows + 1]
        number = following - first + (self.stream_starts[following] < starts + self.seq_length)  # of documents in each
        document = ranges(first, number)
        row_start = np.repeat(starts, number)
        begins, ends = self.stream_starts[document] - row_start, self.stream_starts[document + 1] - row_start
        sizes = np.minimum(ends, self.seq_length) - np.maximum(begins, 0)
        offset = np.repeat(np.arange(len(starts)) * self.seq_length, number)  # of the row among these rows

        place = np.arange(len(starts) * self.seq_length)
        leading = self.frame.first_id is not None
        shift = self.starts[document] - (offset + begins + leading)  # from there to the place in the file
        input_ids = self.tokens.take(place + np.repeat(shift, sizes), mode="clip").astype(np.int64)
        is_text = np.ones(len(place), bool)
        begun, ended = (offset + begins)[begins >= 0], (offset + ends - 1)[ends <= self.seq_length]
        for value, places in ((self.frame.first_id, begun), (self.frame.last_id, ended)):
            if value is not None:
                input_ids[places] = value
                is_text[places] = False
        shape = (len(starts), self.seq_length)
        position_ids = np.empty(shape, np.int64)
        position_ids[:] = np.arange(self.seq_length)
        return {
            "input_ids": input_ids.reshape(shape),
            "position_ids": position_ids,
            "document_ids": np.ones(shape, np.int64),
            "is_text": is_text.reshape(shape),
        }

    def _text_before(self, rows):
        place = rows * self.seq_length
        document = np.minimum(self.first_documents[rows], len(self.lengths) - 1)
        offset = place - self.stream_starts[document]
        leading = self.frame.first_id is not None
        return self.text_before[document] + np.clip(offset - leading, 0, self.lengths[document])


def build_rows(token_file, frame, seq_length, packing, cache_folder, flag="--max_seq_length"):
    """The rows of a token file.

    Args:
        packing: "documents" or "concat"; flag: what the user calls seq_length; the rest as DocumentRows.
    Raises:
        UserError: less text than one row.
    """
    tokens = int(token_file.lengths.sum(dtype=np.int64))
    if tokens < seq_length - frame.size:
        raise UserError(
            f"{Path(cache_folder).name} text: {tokens} tokens are less than one row of {flag} {seq_length}; give "
            "more text or shorter rows"
        )
    if packing == "concat":
        return ConcatenatedRows(token_file, frame, seq_length)
    return DocumentRows(token_file, frame, seq_length, cache_folder)


def _is_whole(folder):
    """Whether a folder holds a plan, with all of each file."""
    try:
        counts = json.loads((folder / "plan.json").read_text())["counts"]
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in PLAN_FILES}
        return all(sizes[name] == counts[name] * np.dtype(dtype).itemsize for name, dtype in PLAN_FILES.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_plan(token_file, seq_length, specials, folder):
    """Cut documents into segments, pack them block by block, and leave the plan complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        counts = dict.fromkeys(PLAN_FILES, 0)
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in PLAN_FILES}
            for block in _plan_blocks(token_file, seq_length, specials):
                for name, dtype in PLAN_FILES.items():
                    files[name].write(block[name].astype(dtype).data)  # tofile would not say that the disk is full
                    counts[name] += len(block[name])
            for file in files.values():
                flush(file)
        (temporary / "plan.json").write_text(json.dumps({"seq_length": seq_length, "counts": counts}))
        flush(temporary / "plan.json")
        flush(temporary)
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_whole(folder):  # otherwise another run was faster; its plan is the same
                raise
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plan_blocks(token_file, seq_length, specials):
    """Yield the plan in parts: dicts of arrays that continue those of the part before."""
    room = seq_length - specials
    pieces = -(-token_file.lengths.astype(np.int64) // room)  # segments of each document
    bounds = np.concatenate([[0], np.cumsum(pieces)])
    for first in range(0, int(bounds[-1]), BLOCK_SEGMENTS):
        last = min(first + BLOCK_SEGMENTS, int(bounds[-1]))
        document, skipped, number = window(bounds, first, last)
        offset = ranges(skipped, number) * room
        starts = np.repeat(token_file.starts[document], number) + offset
        lengths = np.minimum(np.repeat(token_file.lengths[document], number) - offset, room)
        order, row_ends = histogram_pack(lengths + specials, seq_length)
        tokens_before = np.concatenate([[0], np.cumsum(lengths[order] + specials)])
        yield {
            "row_ends": row_ends + first,
            "row_tokens": np.diff(tokens_before[np.concatenate([[0], row_ends])]),
            "starts": starts[order],
            "lengths": lengths[order],
        }
