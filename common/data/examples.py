"""Batches of short labelled texts: encoded once, grouped by length, padded to a multiple of 8.

Which rows make up a global batch depends on (seed, epoch, place) alone, so any number of processes, and a resumed run,
sees the same ones. n examples, B rows in a micro-batch, S positions in it.
"""

from dataclasses import dataclass

import numpy as np

from common.data.batches import to_device
from common.data.masking import derive_key, permute

GROUPED_BATCHES = 50  # global batches whose rows are sorted by length together: the smaller, the more random
LENGTH_MULTIPLE = 8
BATCH_STREAM = 1  # of random numbers: the order of an epoch's batches, beside that of its rows


@dataclass
class EncodedExamples:
    """Examples as token ids.

    input_ids, token_type_ids: [n] arrays of int64, without padding; token_type_ids is None where the model takes none.
    labels: [n] int64 or float32, or None. pad_id: fills rows. length: of every batch, None = of its longest row.
    """

    input_ids: list
    token_type_ids: list | None
    labels: np.ndarray | None
    pad_id: int
    length: int | None

    def __post_init__(self):
        self.lengths = np.array([len(ids) for ids in self.input_ids])

    def __len__(self):
        return len(self.input_ids)

    def batch(self, rows, weights):
        """Some examples as a padded batch.

        Args:
            rows: [B] int64; weights: [B] float32, 0 for a row that only fills the shape.
        Returns:
            dict of arrays: input_ids, attention_mask (and token_type_ids) [B, S] int64, weights [B], labels [B].
        """
        longest = int(self.lengths[rows].max())
        length = self.length or -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        batch = {"input_ids": np.full((len(rows), length), self.pad_id, np.int64)}
        batch["attention_mask"] = np.zeros_like(batch["input_ids"])
        if self.token_type_ids is not None:
            batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
        for place, row in enumerate(rows):
            here = slice(0, self.lengths[row])
            batch["input_ids"][place, here] = self.input_ids[row]
            batch["attention_mask"][place, here] = 1
            if self.token_type_ids is not None:
                batch["token_type_ids"][place, here] = self.token_type_ids[row]
        batch["weights"] = np.asarray(weights, np.float32)
        if self.labels is not None:
            batch["labels"] = self.labels[rows]
        return batch


def encode_examples(examples, task, tokenizer, max_seq_length, pad_to_max_length):
    """Tokenize examples; texts that are too long are cut, the longer of a pair first.

    Args:
        examples: list of common.data.glue.Example; task: common.data.glue.Task.
        max_seq_length: tokens of the longest row, special ones included.
        pad_to_max_length: give every batch this length.
    Returns:
        EncodedExamples.
    """
    texts = list(zip(*(example.texts for example in examples), strict=True))
    encoded = tokenizer(*map(list, texts), truncation=True, max_length=max_seq_length)
    labels = None
    if examples[0].label is not None:
        labels = np.array([example.label for example in examples], np.int64 if task.labels else np.float32)
    types = encoded["token_type_ids"] if "token_type_ids" in tokenizer.model_input_names else None
    return EncodedExamples(
        [np.array(ids) for ids in encoded["input_ids"]],
        types and [np.array(ids) for ids in types],
        labels,
        tokenizer.pad_token_id,
        max_seq_length if pad_to_max_length else None,
    )


class GroupedBatches:
    """Endless micro-batches of one process; rows of a global batch have about the same length.

    Args:
        examples: EncodedExamples with labels; seed: int.
        batch_size: rows in a micro-batch; accumulation: micro-batches of one process in a global batch.
        rank, ranks: this process among those that read different rows; device: torch.device.
        taken: number of global batches that a run has had already.
    """

    def __init__(self, examples, seed, batch_size, accumulation, rank, ranks, device, taken=0):
        self.examples, self.seed, self.batch_size = examples, seed, batch_size
        self.accumulation, self.rank, self.ranks, self.device = accumulation, rank, ranks, device
        self.taken = taken

    @property
    def global_batch(self):
        """Rows in one optimizer step, but for the last one of an epoch, which may have fewer."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def steps_per_epoch(self):
        """Global batches in one pass over the examples."""
        return -(-len(self.examples) // self.global_batch)

    def __iter__(self):
        """Yield (batch, number, tokens): as common.data.batches.TrainBatches."""
        first = self.taken
        while True:
            epoch, begin = divmod(first, self.steps_per_epoch)
            for rows in self.global_batches(epoch)[begin:]:
                yield from self._cut(rows)
                first += 1

    def global_batches(self, epoch):
        """The rows of each global batch of an epoch, in order: list of int64 arrays."""
        number, size = len(self.examples), self.global_batch
        key = derive_key(self.seed, epoch)
        order = permute(np.arange(number), number, key)
        batches = []
        for begin in range(0, number, GROUPED_BATCHES * size):
            group = order[begin : begin + GROUPED_BATCHES * size]
            group = group[np.argsort(-self.examples.lengths[group], kind="stable")]
            batches += [group[at : at + size] for at in range(0, len(group), size)]
        return [
            batches[place] for place in permute(np.arange(len(batches)), len(batches), derive_key(key, BATCH_STREAM))
        ]

    def _cut(self, rows):
        micro_batches = self.accumulation * self.ranks
        tokens = int(self.examples.lengths[rows].sum())
        for number in range(self.rank, micro_batches, self.ranks):
            part = rows[number * self.batch_size : (number + 1) * self.batch_size]
            weights = np.arange(self.batch_size) < len(part)
            part = np.concatenate([part, np.repeat(rows[-1:], self.batch_size - len(part))])  # the shape stays
            batch = self.examples.batch(part, weights)
            batch["loss_denominator"] = np.float32(len(rows) / micro_batches)
            yield to_device(batch, self.device), number, tokens


def prediction_batches(examples, batch_size, rank, ranks, device):
    """Every example once, over all processes, in batches of similar length; each process gets as many.

    Yields:
        (rows, batch): [b] row numbers whose predictions count, and a batch whose first b rows they are.
    """
    order = np.argsort(-examples.lengths, kind="stable")
    number = -(-len(order) // (batch_size * ranks)) * ranks
    for index in range(rank, number, ranks):
        rows = order[index * batch_size : (index + 1) * batch_size]
        filled = np.concatenate([rows, np.repeat(order[-1:], batch_size - len(rows))])
        batch = examples.batch(filled, np.arange(batch_size) < len(rows))
        yield rows, to_device(batch, device)
