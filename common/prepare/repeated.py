"""Documents and lines that occur more than once in the shards, found in bounded memory.

Shards hold their hashes in ascending order; here all of them are compared piece by piece. Of equal things those with
the smallest hash of the document's text stay, whatever the shards, so that another division changes nothing.
"""

import tempfile

import numpy as np

from common.prepare.overlap import BANDS

COMPARED = 1 << 22  # hashes that are compared at once
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
        self.sequence_marks = None
        self.hash_of = [self._array(np.uint64, count) for count in counts]
        for shard, found in zip(shards, self.hash_of, strict=True):
            found[shard.column("documents")] = shard.column("hashes")

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
        self.sequence_marks, hash_of_sequence = [], []
        for shard, marks, hashes in zip(self.shards, self.marks, self.hash_of, strict=True):
            sequences = np.diff(shard.tokens().documents)
            self.sequence_marks.append(self._array(np.uint8, int(sequences.sum())))
            self.sequence_marks[-1][:] = np.repeat(marks != KEPT, sequences)  # REPEATED: they do not count
            hash_of_sequence.append(self._array(np.uint64, int(sequences.sum())))
            hash_of_sequence[-1][:] = np.repeat(hashes, sequences)
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

    def hashes(self, number):
        """uint64 [n] of the texts of a shard's documents."""
        return self.hash_of[number]

    def kept(self, number):
        """bool [n]: which documents of a shard stay."""
        kept = self.marks[number] == KEPT
        return kept if self.sequence_marks is None else kept & self._has_lines(number)

    def kept_sequences(self, number):
        """bool [s]: which lines of a shard stay in the documents that do."""
        return self.sequence_marks[number] == KEPT

    def _has_lines(self, number):
        """bool [n]: which documents have a line left."""
        shard = self.shards[number]
        lines = np.zeros(len(self.sequence_marks[number]), bool)
        lines[shard.column("sequences")] = True
        lines &= self.kept_sequences(number)
        before = np.concatenate([[0], np.cumsum(lines)])
        bounds = shard.tokens().documents
        return before[bounds[1:]] > before[bounds[:-1]]

    def found(self, number):
        """Yield (reason, places, whether they are lines) of what a shard loses: documents, or sequences."""
        for mark, reason in REASONS.items():
            if len(places := np.flatnonzero(self.marks[number] == mark)):
                yield reason, places, False
        if self.sequence_marks is not None:
            if len(places := np.flatnonzero((self.marks[number] == KEPT) & ~self._has_lines(number))):
                yield NO_LINES_LEFT, places, False
            if len(places := np.flatnonzero(self.sequence_marks[number] == SIMILAR)):
                yield LINE, places, True
