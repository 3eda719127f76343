"""Micro-batches for one process: rows in the order of (seed, epoch), masked by (seed, epoch, row), prefetched.

The rows of a run form one endless sequence; a global batch is the next G of it, cut into micro-batches that are dealt
to the processes in turn. What a batch holds depends on its place in that sequence alone, so a resumed run, or one on
another number of processes, sees the same global batches.
"""

import queue
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from common.data.masking import derive_key, mask_rows, permute, targets_per_row
from common.data.tokenizers import vocabulary_size

LOCATED_ROWS = 1 << 14  # a place in the order costs 0.1 KB
BUILT_TOKENS = 1 << 17  # of several micro-batches; about 6 MB while they are made
EVAL_SEED = 0x5EED  # validation masks are the same for every run, whatever its seed
EVAL_PROBABILITY = 0.15  # and so is their rate, so that losses can be compared


@dataclass(frozen=True)
class Masking:
    """What mask_rows needs besides the rows."""

    probability: float
    vocab_size: int
    mask_id: int

    @classmethod
    def for_tokenizer(cls, tokenizer, probability):
        return cls(probability, vocabulary_size(tokenizer), tokenizer.mask_token_id)


class TrainBatches:
    """Endless micro-batches of one process, from any place in the sequence of rows.

    Args:
        rows: DocumentRows or ConcatenatedRows.
        masking: Masking.
        seed: int.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches of one process in a global batch.
        rank, ranks: this process among those that read different rows.
        device: torch.device.
        consumed_rows: where to begin in the sequence; a multiple of the global batch after a resume.
    Attributes:
        wait_seconds: time the training loop has waited for data so far.
    """

    def __init__(self, rows, masking, seed, batch_size, accumulation, rank, ranks, device, consumed_rows=0):
        self.rows, self.masking, self.seed = rows, masking, seed
        self.batch_size, self.accumulation, self.rank, self.ranks = batch_size, accumulation, rank, ranks
        self.device, self.consumed_rows = device, consumed_rows
        self.k = targets_per_row(masking.probability, rows.seq_length)
        self.wait_seconds = 0.0

    @property
    def global_batch(self):
        """Rows in one optimizer step."""
        return self.batch_size * self.accumulation * self.ranks

    def __iter__(self):
        """Yield (batch, number, tokens): tensors on the device, the micro-batch's number within the global batch, and
        the real tokens of the whole global batch."""
        ready = queue.Queue(maxsize=4)
        stop = threading.Event()
        worker = threading.Thread(target=self._fill, args=(ready, stop), daemon=True, name="prefetch")
        worker.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                batch, number, tokens = item
                yield to_device(batch, self.device), number, tokens
        finally:
            stop.set()

    def _fill(self, ready, stop):
        try:
            for item in self.micro_batches():
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except BaseException as error:  # raised again in the training loop
            ready.put(error)

    def micro_batches(self):
        """As __iter__, but numpy arrays, made by the thread that asks for them.

        Many steps are located and many rows built at once: most of what numpy costs, it costs per call.
        """
        first = self.consumed_rows
        steps = max(1, LOCATED_ROWS // self.global_batch)
        at_once = max(1, BUILT_TOKENS // (self.batch_size * self.rows.seq_length))  # micro-batches
        while True:
            epoch, row = self.locate(np.arange(first, first + steps * self.global_batch))
            keys = derive_key(self.seed, epoch, row)
            weight = np.minimum(self.rows.text_tokens(row), self.k).reshape(steps, -1).sum(axis=1)
            tokens = self.rows.real_tokens(row).reshape(steps, -1).sum(axis=1)
            dealt = (steps * self.accumulation, self.ranks, self.batch_size)
            row, keys = row.reshape(dealt)[:, self.rank], keys.reshape(dealt)[:, self.rank]  # of this process
            for begin in range(0, len(row), at_once):
                part = slice(begin, begin + at_once)
                built = make_batch(self.rows, row[part].ravel(), self.masking, self.k, keys[part].ravel())
                built = {name: array.reshape(-1, self.batch_size, array.shape[1]) for name, array in built.items()}
                for index in range(len(built["input_ids"])):
                    step, micro_batch = divmod(begin + index, self.accumulation)
                    batch = {name: array[index] for name, array in built.items()}
                    batch["loss_denominator"] = np.float32(weight[step] / (self.accumulation * self.ranks))
                    yield batch, micro_batch * self.ranks + self.rank, int(tokens[step])
            first += steps * self.global_batch

    def locate(self, places):
        """(epoch, row), each [n] int64, for places in the endless sequence of rows."""
        epoch, index = np.divmod(places, len(self.rows))
        row = np.empty_like(index)
        for number in np.unique(epoch):  # one, or two at the seam
            here = epoch == number
            row[here] = permute(index[here], len(self.rows), derive_key(self.seed, number))
        return epoch, row


class EvalBatches:
    """The fixed validation batches of one process.

    Args:
        rows: rows of the held-out documents.
        masking: Masking; its probability is not used, validation always masks 15 %.
        max_samples: rows to use, spread over all of them.
        batch_size: rows in a batch. rank, ranks, device: as TrainBatches.
    """

    def __init__(self, rows, masking, max_samples, batch_size, rank, ranks, device):
        self.rows, self.masking, self.device = rows, masking, device
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        self.k = targets_per_row(EVAL_PROBABILITY, rows.seq_length)
        number = min(max_samples, len(rows))
        self.chosen = np.sort(permute(np.arange(number), len(rows), derive_key(EVAL_SEED)))

    def __iter__(self):
        for batch in self.batches(range(self.rank, self.number_of_batches, self.ranks)):
            yield to_device(batch, self.device)

    @property
    def number_of_batches(self):
        """Batches over all processes, the same number for each of them."""
        number = -(-len(self.chosen) // self.batch_size)
        return -(-number // self.ranks) * self.ranks

    def batches(self, numbers):
        """Yield the batches with these numbers, as numpy arrays; rows beyond the end have weight 0."""
        for number in numbers:
            place = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            row = self.chosen[np.minimum(place, len(self.chosen) - 1)]
            batch = make_batch(self.rows, row, self.masking, self.k, derive_key(EVAL_SEED, row))
            batch["masked_weights"][place >= len(self.chosen)] = 0
            batch["loss_denominator"] = np.float32(1)
            yield batch


def make_batch(rows, row, masking, k, keys):
    """One masked micro-batch as numpy arrays, by the batch contract.

    Args:
        rows: DocumentRows or ConcatenatedRows; row: [B] int64; keys: [B] uint64; k: targets in a row.
    Returns:
        dict: input_ids, position_ids, document_ids [B, S]; masked_positions, masked_labels, masked_weights [B, k].
    """
    batch = rows.build(row)
    maskable = batch.pop("maskable")
    positions, labels, weights = mask_rows(batch["input_ids"], maskable, keys, k, masking.vocab_size, masking.mask_id)
    return batch | {"masked_positions": positions, "masked_labels": labels, "masked_weights": weights}


def to_device(batch, device):
    """Numpy arrays to tensors on the device, without waiting for it."""
    tensors = {name: torch.as_tensor(array) for name, array in batch.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
