"""Rows of fixed length from documents of any length. Which tokens make up row n is fixed once, here.

T tokens in the file, n documents, R rows, G segments, B rows in a batch, S tokens in a row.

A segment is a piece of one document between [CLS] and [SEP]; a row holds whole segments.
"""

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from common.data.ranges import ranges, window
from common.errors import UserError
from common.files import flush

SPECIALS = 2  # [CLS] and [SEP] around every segment
BLOCK_SEGMENTS = 1 << 20  # packed together; beside the documents' lengths, planning needs memory for one block
PLAN_FORMAT = 2
PLAN_FILES = {"row_ends": "<i8", "row_tokens": "<i4", "starts": "<i8", "lengths": "<i4"}  # name.bin and its dtype


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
        tokenizer: for the ids of [CLS], [SEP] and [PAD].
        seq_length: S.
        cache_folder: where the plan is kept, memory-mapped, for the next run.
    """

    def __init__(self, token_file, tokenizer, seq_length, cache_folder):
        self.tokens, self.seq_length = np.asarray(token_file.tokens), seq_length
        self.cls_id, self.sep_id, self.pad_id = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        folder = Path(cache_folder) / f"rows-{seq_length}-v{PLAN_FORMAT}"
        if not _is_whole(folder):
            _write_plan(token_file, seq_length, folder)
        # memory maps, but as plain arrays: what is taken out of a np.memmap is one, too, which costs time
        load = lambda name: np.asarray(np.memmap(folder / f"{name}.bin", PLAN_FILES[name], mode="r"))  # noqa: E731
        self.row_ends, self.row_tokens = load("row_ends"), load("row_tokens")
        self.starts, self.lengths = load("starts"), load("lengths")

    def __len__(self):
        return len(self.row_ends)

    def text_tokens(self, rows):
        """[B] int64: tokens of text in each row, special tokens and padding not counted."""
        first, last = self._segment_range(rows)
        return self.row_tokens[rows].astype(np.int64) - SPECIALS * (last - first)

    def real_tokens(self, rows):
        """[B] int64: tokens in each row, special tokens included, padding not."""
        return self.row_tokens[rows].astype(np.int64)

    def build(self, rows):
        """The content of some rows.

        Args:
            rows: [B] int64 row numbers.
        Returns:
            dict of [B, S]: input_ids, position_ids, document_ids int64 (0 = padding), maskable bool.
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
        sizes[text] = self.lengths[segment] + SPECIALS
        sizes[padding] = self.seq_length - self.row_tokens[rows]
        ends = np.cumsum(sizes)
        begins = ends - sizes  # in these rows laid end to end
        shift = np.zeros_like(begins)
        shift[text] = self.starts[segment] - (begins[text] + 1)  # from there to the place in the file

        place = np.arange(len(rows) * self.seq_length)
        input_ids = self.tokens.take(place + np.repeat(shift, sizes), mode="clip").astype(np.int64)
        position_ids = place - np.repeat(begins, sizes)
        document_ids = np.repeat(document, sizes)
        maskable = np.ones(len(place), bool)
        unused = ranges(begins[padding], sizes[padding])
        position_ids[unused] = 0
        for value, places in ((self.cls_id, begins[text]), (self.sep_id, ends[text] - 1), (self.pad_id, unused)):
            input_ids[places] = value
            maskable[places] = False
        flat = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "document_ids": document_ids,
            "maskable": maskable,
        }
        return {name: array.reshape(len(rows), self.seq_length) for name, array in flat.items()}

    def _segment_range(self, rows):
        rows = np.asarray(rows)
        first = np.where(rows > 0, self.row_ends[rows - 1], 0)
        return first, self.row_ends[rows]


class ConcatenatedRows:
    """Rows cut from one stream of [CLS] document [SEP] [CLS] document [SEP] …, as the masked-LM example does it.

    What is left after the last full row is dropped, as there. Arguments as DocumentRows, without a plan to keep.
    """

    def __init__(self, token_file, tokenizer, seq_length):
        self.tokens, self.seq_length = np.asarray(token_file.tokens), seq_length
        self.cls_id, self.sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.starts = np.asarray(token_file.starts)
        self.lengths = np.asarray(token_file.lengths, dtype=np.int64)
        self.stream_starts = np.concatenate([[0], np.cumsum(self.lengths + SPECIALS)])  # [n + 1]
        self.text_before = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self):
        return int(self.stream_starts[-1]) // self.seq_length

    def real_tokens(self, rows):
        """[B] int64: tokens in each row."""
        return np.full(len(rows), self.seq_length)

    def text_tokens(self, rows):
        """[B] int64: tokens of text in each row."""
        first = np.asarray(rows) * self.seq_length
        return self._text_up_to(first + self.seq_length) - self._text_up_to(first)

    def build(self, rows):
        """As DocumentRows.build; positions run through the row and document_ids are 1."""
        starts = np.asarray(rows) * self.seq_length  # in the stream
        first = np.searchsorted(self.stream_starts, starts, side="right") - 1
        number = np.searchsorted(self.stream_starts, starts + self.seq_length) - first  # of documents in each row
        document = ranges(first, number)
        row_start = np.repeat(starts, number)
        begins, ends = self.stream_starts[document] - row_start, self.stream_starts[document + 1] - row_start
        sizes = np.minimum(ends, self.seq_length) - np.maximum(begins, 0)
        offset = np.repeat(np.arange(len(starts)) * self.seq_length, number)  # of the row among these rows

        place = np.arange(len(starts) * self.seq_length)
        shift = self.starts[document] - (offset + begins + 1)  # from there to the place in the file
        input_ids = self.tokens.take(place + np.repeat(shift, sizes), mode="clip").astype(np.int64)
        maskable = np.ones(len(place), bool)
        opened, closed = begins >= 0, ends <= self.seq_length
        for value, places in ((self.cls_id, (offset + begins)[opened]), (self.sep_id, (offset + ends - 1)[closed])):
            input_ids[places] = value
            maskable[places] = False
        shape = (len(starts), self.seq_length)
        position_ids = np.empty(shape, np.int64)
        position_ids[:] = np.arange(self.seq_length)
        return {
            "input_ids": input_ids.reshape(shape),
            "position_ids": position_ids,
            "document_ids": np.ones(shape, np.int64),
            "maskable": maskable.reshape(shape),
        }

    def _text_up_to(self, place):
        place = np.minimum(place, self.stream_starts[-1] - 1)
        document = np.searchsorted(self.stream_starts, place, side="right") - 1
        offset = place - self.stream_starts[document]
        return self.text_before[document] + np.clip(offset - 1, 0, self.lengths[document])


def build_rows(token_file, tokenizer, seq_length, packing, cache_folder):
    """The rows of a token file.

    Args:
        packing: "documents" or "concat"; the rest as DocumentRows.
    Raises:
        UserError: less text than one row.
    """
    tokens = int(token_file.lengths.sum(dtype=np.int64))
    if tokens < seq_length - SPECIALS:
        raise UserError(
            f"{Path(cache_folder).name} text: {tokens} tokens are less than one row of --max_seq_length {seq_length}; "
            "give more text or shorter rows"
        )
    if packing == "concat":
        return ConcatenatedRows(token_file, tokenizer, seq_length)
    return DocumentRows(token_file, tokenizer, seq_length, cache_folder)


def _is_whole(folder):
    """Whether a folder holds a plan, with all of each file."""
    try:
        counts = json.loads((folder / "plan.json").read_text())["counts"]
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in PLAN_FILES}
        return all(sizes[name] == counts[name] * np.dtype(dtype).itemsize for name, dtype in PLAN_FILES.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_plan(token_file, seq_length, folder):
    """Cut documents into segments, pack them block by block, and leave the plan complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        counts = dict.fromkeys(PLAN_FILES, 0)
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in PLAN_FILES}
            for block in _plan_blocks(token_file, seq_length):
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


def _plan_blocks(token_file, seq_length):
    """Yield the plan in parts: dicts of arrays that continue those of the part before."""
    room = seq_length - SPECIALS
    pieces = -(-token_file.lengths.astype(np.int64) // room)  # segments of each document
    bounds = np.concatenate([[0], np.cumsum(pieces)])
    for first in range(0, int(bounds[-1]), BLOCK_SEGMENTS):
        last = min(first + BLOCK_SEGMENTS, int(bounds[-1]))
        document, skipped, number = window(bounds, first, last)
        offset = ranges(skipped, number) * room
        starts = np.repeat(token_file.starts[document], number) + offset
        lengths = np.minimum(np.repeat(token_file.lengths[document], number) - offset, room)
        order, row_ends = histogram_pack(lengths + SPECIALS, seq_length)
        tokens_before = np.concatenate([[0], np.cumsum(lengths[order] + SPECIALS)])
        yield {
            "row_ends": row_ends + first,
            "row_tokens": np.diff(tokens_before[np.concatenate([[0], row_ends])]),
            "starts": starts[order],
            "lengths": lengths[order],
        }
