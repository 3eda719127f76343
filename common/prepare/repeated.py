"""Documents and lines that occur more than once in the shards, found in bounded memory.

Shards hold their hashes in ascending order; here all of them are compared piece by piece. Of equal things those with
the smallest hash of the document's text stay, whatever the shards, so that another division changes nothing.
"""

import tempfile

import numpy as np

from common.prepare.overlap import BANDS

COMPARED = 1 << 18  # hashes that are compared at once
# What becomes of a document or a sequence:
KEPT, REPEATED, SIMILAR = 0, 1, 2
REASONS = {REPEATED: "occurred before", SIMILAR: "nearly the same as another"}
NO_LINES_LEFT, LINE = "of repeated lines alone", "repeated lines"


class Repeated:
    """What is found, on the disk beside the shards, removed at the end of the context.

    Args:
        shards: list of FinishedShard; folder: Path for scratch files.
    """

    def __init__(self, shards, folder):
        self.shards, self.folder = shards, folder
        self.scratch = []
        counts = [shard.num_documents for shard in shards]
        self.marks = [self._array(np.uint8, count) for count in counts]  # of documents
        self.sequence_marks = self.text_lines = None
        self.hash_of = [self._array(np.uint64, count) for count in counts]
        for shard, found in zip(shards, self.hash_of, strict=True):
            for documents, hashes in _blocks(shard.column("documents"), shard.column("hashes")):
                found[documents] = hashes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.scratch:
            file.close()

    def _array(self, dtype, size):
        """Zeros that are on the disk, so that they may be many."""
        self.scratch.append(tempfile.TemporaryFile(dir=self.folder, prefix=".scratch"))  # has no name, nothing stays
        return np.memmap(self.scratch[-1], dtype, "w+", shape=(size,))

    # ---- Find --------------------------------------------------------------------------------------------------

    def find_documents(self):
        """Mark every document whose text another one has, except one."""
        self._mark("hashes", "documents", self.marks, self.hash_of, 1, REPEATED)

    def find_near_duplicates(self):
        """Mark every document that shares a band with another one of a smaller hash."""
        for band in range(BANDS):
            self._mark(f"band {band}", f"documents of band {band}", self.marks, self.hash_of, 1, SIMILAR)

    def find_lines(self, most):
        """Mark lines that occur more than `most` times in the documents that are left, beyond so many."""
        counts = [sum(len(window.tokens.lengths) for window in shard.windows()) for shard in self.shards]
        self.sequence_marks = [self._array(np.uint8, count) for count in counts]
        self.text_lines = [self._array(np.uint8, count) for count in counts]  # 1: not blank
        hash_of_sequence = [self._array(np.uint64, count) for count in counts]
        for number, shard in enumerate(self.shards):
            for window in shard.windows():
                lines = np.diff(window.tokens.documents)
                left_out = self.marks[number][window.documents] != KEPT
                self.sequence_marks[number][window.sequences] = np.repeat(left_out, lines)  # REPEATED: do not count
                hash_of_sequence[number][window.sequences] = np.repeat(self.hashes(number, window), lines)
            for (sequences,) in _blocks(shard.column("sequences")):
                self.text_lines[number][sequences] = 1
        self._mark("lines", "sequences", self.sequence_marks, hash_of_sequence, most, SIMILAR)

    def _mark(self, values, places, marks, keys, most, mark):
        """Mark what has the same value as `most` others of smaller keys; what is REPEATED is none of them.

        Args:
            values, places: names of columns: the values ascending, and the numbers of what they belong to.
            marks, keys: by these numbers, for each shard.
        """
        values = [shard.column(values) for shard in self.shards]
        places = [shard.column(places) for shard in self.shards]
        parts = -(-sum(map(len, values)) // COMPARED) or 1
        for part in range(parts):
            low, high = (np.uint64(min(at * 2**64 // parts, 2**64 - 1)) for at in (part, part + 1))
            side = "right" if part == parts - 1 else "left"  # the last part has the largest one too
            here = []
            for number, found in enumerate(values):
                begin, end = found.searchsorted(low), found.searchsorted(high, side=side)
                place = places[number][begin:end]
                counted = marks[number][place] != REPEATED
                place = place[counted]
                here.append((found[begin:end][counted], keys[number][place], np.full(len(place), number), place))
            value, key, number, place = map(np.concatenate, zip(*here, strict=True))
            order = np.lexsort((place, number, key, value))
            value = value[order]
            first = np.searchsorted(value, value)  # of those that are equal
            beyond = order[np.arange(len(value)) - first >= most]
            for shard in np.unique(number[beyond]):
                marks[shard][place[beyond[number[beyond] == shard]]] = mark

    # ---- Say ---------------------------------------------------------------------------------------------------

    def hashes(self, number, window):
        """uint64 [n] of the texts of a window's documents. Args: number: of the shard; window: Window of it."""
        return self.hash_of[number][window.documents]

    def kept(self, number, window):
        """bool [n]: which documents of a window stay."""
        kept = self.marks[number][window.documents] == KEPT
        return kept if self.sequence_marks is None else kept & self._has_lines(number, window)

    def kept_sequences(self, number, window):
        """bool [s]: which lines of a window stay in the documents that do."""
        return self.sequence_marks[number][window.sequences] == KEPT

    def _has_lines(self, number, window):
        """bool [n]: which documents have a line left."""
        lines = self.text_lines[number][window.sequences].astype(bool) & self.kept_sequences(number, window)
        before = np.concatenate([[0], np.cumsum(lines)])
        bounds = window.tokens.documents
        return before[bounds[1:]] > before[bounds[:-1]]

    def found(self, number, window):
        """Yield (reason, places in the window, whether they are lines) of what it loses: documents, or sequences."""
        marks = self.marks[number][window.documents]
        for mark, reason in REASONS.items():
            yield reason, np.flatnonzero(marks == mark), False
        if self.sequence_marks is not None:
            without_lines = (marks == KEPT) & ~self._has_lines(number, window)
            yield NO_LINES_LEFT, np.flatnonzero(without_lines), False
            yield LINE, np.flatnonzero(self.sequence_marks[number][window.sequences] == SIMILAR), True


def _blocks(*columns):
    """Yield the same part of every column, one after the other."""
    for at in range(0, len(columns[0]), COMPARED):
        yield [column[at : at + COMPARED] for column in columns]
