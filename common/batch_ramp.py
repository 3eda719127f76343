"""A global batch that grows in the first part of a run."""

import sys
from bisect import bisect_right

from common.batch_size import cut_global_batch
from common.errors import UserError


class BatchRamp:
    """Rows in the global batch of each step, a function of the rows consumed before it.

    Args:
        final: rows in the global batch in the end.
        growth: () where it is so from the beginning; or (start, increment, rows): it begins with `start`, and while
            `rows` are consumed `increment` is added again and again, at equal distances in rows.
    Raises:
        UserError: a growth that does not lead from start to final.
    Source: Megatron-LM's --rampup-batch-size, whose meaning and arguments these are.
    """

    def __init__(self, final, growth=()):
        self.places, self.sizes = [], []  # where a size begins, in rows; and the sizes
        place = 0
        if growth:
            start, increment, rows = growth
            if not 0 < start < final or increment < 1 or rows < 1 or (final - start) % increment:
                raise UserError(
                    f"--rampup_batch_size {start} {increment} {rows} does not lead to --train_batch_size {final}: "
                    "give a smaller start, an increment that divides the difference, and the rows over which it grows"
                )
            smaller = range(start, final, increment)
            for number, size in enumerate(smaller, 1):
                steps = -(-(number * rows - place * len(smaller)) // (size * len(smaller)))
                if steps > 0:  # otherwise one step of the size before was enough for this part, too
                    self._add(place, size)
                    place += steps * size
        self._add(place, final)

    def _add(self, place, size):
        self.places.append(place)
        self.sizes.append(size)

    def cut(self, per_device, ranks):
        """(rows per device, accumulation in the end), as cut_global_batch; every size can be cut so."""
        per_device, accumulation = cut_global_batch(self.sizes[-1], per_device, ranks)
        for size in self.sizes:
            if size % (per_device * ranks):
                raise UserError(
                    f"--rampup_batch_size: a batch of {size} is not divisible by {per_device} rows per device x "
                    f"{ranks} processes: change it, or lower --per_device_train_batch_size"
                )
        return per_device, accumulation

    def least_accumulation(self, per_device, ranks):
        """Accumulation in the beginning, which is the least. Args: per_device: as cut has returned it; ranks."""
        return self.sizes[0] // (per_device * ranks)

    def at(self, rows):
        """(rows in the step that begins after so many rows, how many steps of that size come)."""
        number = bisect_right(self.places, rows) - 1
        size, ends = self.sizes[number], self.places[number + 1 : number + 2]
        return size, (ends[0] - rows) // size if ends else sys.maxsize

    def rows_after(self, steps):
        """Rows in so many steps from the beginning on."""
        for place, size, end in zip(self.places, self.sizes, self.places[1:], strict=False):
            if steps <= (end - place) // size:
                return place + steps * size
            steps -= (end - place) // size
        return self.places[-1] + steps * self.sizes[-1]

    def steps_for(self, rows):
        """Steps that it takes to consume so many rows."""
        steps = 0
        for place, size, end in zip(self.places, self.sizes, self.places[1:], strict=False):
            if rows <= end:
                return steps + -(-(rows - place) // size)
            steps += (end - place) // size
        return steps + -(-(rows - self.places[-1]) // self.sizes[-1])
