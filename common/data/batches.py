"""Micro-batches for one process: rows in the order of (seed, epoch), made by (seed, epoch, row), prefetched.

The rows of a run form one endless sequence; a global batch is the next G of it, cut into micro-batches that are dealt
to the processes in turn. What a batch holds depends on its place in that sequence alone, so a resumed run, or one on
another number of processes, sees the same global batches.
"""

import contextlib
import queue
import threading
import time
from dataclasses import dataclass, field
from math import gcd
from typing import ClassVar

import numpy as np
import torch

from common.batch_ramp import BatchRamp
from common.data.masking import (
    REPLACED,
    SAMPLING_STREAM,
    choose_tokens,
    derive_key,
    permute,
    random_bits,
    replace_tokens,
    targets_per_row,
)
from common.data.tokenizers import vocabulary_size
from common.data.words import RUN_WORDS, choose_words, word_begins

LOCATED_ROWS = 1 << 14  # a place in the order costs 0.1 KB
BUILT_TOKENS = 1 << 17  # of several micro-batches; about 6 MB while they are made
EVAL_SEED = 0x5EED  # validation masks are the same for every run, whatever its seed
EVAL_PROBABILITY = 0.15  # and so is their rate, so that losses can be compared


@dataclass(frozen=True)
class Masking:
    """Masked-language modelling as an objective: what is predicted in a row, and what its batches hold."""

    probability: float  # at the beginning of a run
    vocab_size: int
    mask_id: int
    final_probability: float | None = None  # at its end, where that is another one
    replaced: tuple[int, int, int] = REPLACED  # see replace_tokens
    word_begins: np.ndarray | None = field(
        default=None, repr=False, compare=False
    )  # bool [V]; None: tokens are chosen
    run_words: int = 1  # most words in a row that are chosen together
    judges_tokens: bool = False  # all of them, by what a generator puts in the place of those that are masked
    labels: ClassVar[str] = "masked_labels"  # which of a batch's arrays says what is predicted,
    weights: ClassVar[str] = "masked_weights"  # and which what counts

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer,
        mlm_probability,
        masking="token",
        mask_replace_prob=0.8,
        random_replace_prob=0.1,
        final_mlm_probability=None,
        judges_tokens=False,
    ):
        """As the flags of these names say.

        Args:
            tokenizer: transformers' fast one, with a mask token; judges_tokens: as the field.
        """
        shares = [round(share * 1000) for share in (mask_replace_prob, random_replace_prob)]
        common = gcd(*shares, 1000)
        return cls(
            mlm_probability,
            vocabulary_size(tokenizer),
            tokenizer.mask_token_id,
            final_mlm_probability,
            (*(share // common for share in shares), 1000 // common),
            None if masking == "token" else word_begins(tokenizer),
            RUN_WORDS if masking == "ngram" else 1,
            judges_tokens,
        )

    def for_validation(self):
        """The same for all runs: 15 % of the tokens are chosen, and treated as in BERT."""
        return Masking(EVAL_PROBABILITY, self.vocab_size, self.mask_id, judges_tokens=self.judges_tokens)

    def most_targets(self, seq_length):
        """k: fixed for a run, whose rate may change."""
        return targets_per_row(max(self.probability, self.final_probability or 0.0), seq_length)

    def limits(self, rows, row, keys, progress):
        """[B]: positions to choose in rows, at most k; None: k everywhere. Arguments as make_batch.

        Source: Ankner et al. 2023, "Dynamic masking rate schedules for MLM pretraining" (arXiv:2305.15096), linear.
        """
        if self.final_probability is None and rows.full:
            return None
        final = self.probability if self.final_probability is None else self.final_probability
        rate = self.probability + (final - self.probability) * progress
        tokens = rows.seq_length if rows.full else rows.real_tokens(row, keys)
        return np.clip(np.rint(rate * tokens), 1, self.most_targets(rows.seq_length)).astype(np.int64)

    def targets(self, rows, row, keys, progress):
        """[B]: positions that count in each row. Arguments as make_batch."""
        limits, k = self.limits(rows, row, keys, progress), self.most_targets(rows.seq_length)
        return np.minimum(rows.text_tokens(row, keys), k if limits is None else limits)

    def make_batch(self, rows, row, keys, progress=0.0):
        """One masked micro-batch as numpy arrays, by the batch contract.

        Args:
            rows: DocumentRows, ConcatenatedRows or SentencePairs; row: [B] int64; keys: [B] uint64.
            progress: share of the run that is over when these rows come, [B] float64 or one number.
        Returns:
            dict: what rows.build gives, without is_text; masked_positions, masked_labels, masked_weights [B, k]; where
            all tokens are judged sampling_keys [B, k] int64, a function of a row's key and of the position, and
            token_weights [B, S] float32, 0 for padding.
        """
        batch, k = rows.build(row, keys), self.most_targets(rows.seq_length)
        limits = self.limits(rows, row, keys, np.broadcast_to(progress, row.shape))
        ids, is_text = batch["input_ids"], batch.pop("is_text")
        if self.word_begins is None:
            chosen = choose_tokens(is_text, keys, k, limits)
        else:
            chosen = choose_words(is_text, self.word_begins[ids], keys, k, self.run_words, limits)
        targets = replace_tokens(ids, chosen, keys, self.vocab_size, self.mask_id, self.replaced)
        batch |= dict(zip(("masked_positions", "masked_labels", "masked_weights"), targets, strict=True))
        if self.judges_tokens:
            draws = random_bits(derive_key(keys, SAMPLING_STREAM)[:, None], batch["masked_positions"])
            batch |= {"sampling_keys": draws.view(np.int64)}
            batch |= {"token_weights": (batch["document_ids"] > 0).astype(np.float32)}
        return batch


class NextToken:
    """Causal language modelling as an objective; see Masking."""

    labels, weights = "labels", "weights"
    judges_tokens = False

    def for_validation(self):
        """The same."""
        return self

    def targets(self, rows, row, _keys, _progress):
        """[B]: tokens that are predicted in each row: those that follow another one of their document."""
        return rows.next_tokens(row)

    def make_batch(self, rows, row, keys, progress=0.0):
        """One micro-batch as numpy arrays, nothing random in it; arguments as Masking.make_batch.

        Returns:
            dict of [B, S]: input_ids, position_ids, document_ids; labels, the next token, 0 where there is none; and
            weights float32, 0 there and 1 elsewhere.
        """
        batch = rows.build(row)
        del batch["is_text"]
        document = batch["document_ids"]
        goes_on = np.zeros(document.shape, bool)
        goes_on[:, :-1] = (document[:, 1:] == document[:, :-1]) & (document[:, :-1] > 0)
        labels = np.zeros_like(batch["input_ids"])
        labels[:, :-1] = batch["input_ids"][:, 1:]
        return batch | {"labels": labels * goes_on, "weights": goes_on.astype(np.float32)}


class TrainBatches:
    """Endless micro-batches of one process, from any place in the sequence of rows.

    Args:
        rows: DocumentRows, ConcatenatedRows, SentencePairs or SyntheticRows.
        objective: Masking or NextToken.
        seed: int.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches of one process in a global batch.
        rank, ranks: this process among those that read different rows.
        device: torch.device.
        consumed_rows: where to begin in the sequence; a multiple of the global batch after a resume.
        total_rows: of the whole run, for an objective that changes with its progress; None: it stays at its beginning.
        ramp: common.batch_ramp.BatchRamp, for a global batch that grows to this one; None: it is the same everywhere.
        shorter: [(end, rows)]: rows of shorter lengths that come before `rows`, until that share of the run is over.
            All that counts rows, here and in the state of a run, counts those of full length: of rows that are n
            times shorter, n take the place of one.
    Attributes:
        rows: those of the stage that the last next_step was in.
        wait_seconds: time the training loop has waited for data so far.
    """

    def __init__(
        self,
        rows,
        objective,
        seed,
        batch_size,
        accumulation,
        rank,
        ranks,
        device,
        consumed_rows=0,
        total_rows=None,
        ramp=None,
        shorter=(),
    ):
        self.rows, self.objective, self.seed = rows, objective, seed
        self.longest, self.shorter = rows, shorter
        self.total_rows = total_rows
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        self.ramp = ramp or BatchRamp(batch_size * accumulation * ranks)
        self.device, self.consumed_rows = device, consumed_rows
        self.wait_seconds = 0.0

    @property
    def times(self):
        """How many rows of the present stage take the place of one of full length."""
        return self.longest.seq_length // self.rows.seq_length

    def rows_at(self, progress):
        """The rows of a stage. Args: progress: share of the run that is over."""
        return next((rows for end, rows in self.shorter if progress < end), self.longest)

    def next_step(self, consumed_rows, progress=1.0):
        """Begin a step, and a stage where it is the first of one.

        Args:
            consumed_rows: in the steps before it; progress: as rows_at.
        Returns:
            (rows in the step, micro-batches of one process in it).
        """
        rows = self.rows_at(progress)
        if rows is not self.rows:
            self.rows, self.consumed_rows = rows, consumed_rows
        size, _ = self.ramp.at(consumed_rows)
        return size, size // (self.batch_size * self.ranks)

    def __iter__(self):
        """Yield (batch, number, tokens): tensors on the device, the micro-batch's number within the global batch, and
        the real tokens of the whole global batch."""
        while True:
            rows = self.rows
            with contextlib.closing(self._prefetched()) as items:
                for item in items:
                    yield item
                    if rows is not self.rows:  # what was made ahead is of the stage before
                        break

    def _prefetched(self):
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
        first, rows, times = self.consumed_rows, self.rows, self.times
        batch_size = times * self.batch_size
        at_once = max(1, BUILT_TOKENS // (batch_size * rows.seq_length))  # micro-batches
        while True:
            size, left = self.ramp.at(first)
            accumulation = size // (self.batch_size * self.ranks)
            steps = min(max(1, LOCATED_ROWS // size), left)
            places = np.arange(times * first, times * (first + steps * size))
            epoch, row = self.locate(places, rows)
            keys = derive_key(self.seed, epoch, row)
            progress = np.minimum(places / (times * self.total_rows if self.total_rows else np.inf), 1.0)
            weight = self.objective.targets(rows, row, keys, progress).reshape(steps, -1).sum(axis=1)
            tokens = rows.real_tokens(row, keys).reshape(steps, -1).sum(axis=1)
            dealt = (steps * accumulation, self.ranks, batch_size)
            own = [array.reshape(dealt)[:, self.rank] for array in (row, keys, progress)]  # of this process
            for begin in range(0, len(own[0]), at_once):
                built = (array[begin : begin + at_once].ravel() for array in own)
                built = self.objective.make_batch(rows, *built)
                built = {name: array.reshape(-1, batch_size, array.shape[1]) for name, array in built.items()}
                for index in range(len(built["input_ids"])):
                    step, micro_batch = divmod(begin + index, accumulation)
                    batch = {name: array[index] for name, array in built.items()}
                    batch["loss_denominator"] = np.float32(weight[step] / (accumulation * self.ranks))
                    if self.objective.judges_tokens:
                        batch["token_denominator"] = np.float32(tokens[step] / (accumulation * self.ranks))
                    yield batch, micro_batch * self.ranks + self.rank, int(tokens[step])
            first += steps * size

    def locate(self, places, rows=None):
        """(epoch, row), each [n] int64, for places in the endless sequence of rows: of full length, or others."""
        number_of_rows = len(self.longest if rows is None else rows)
        epoch, index = np.divmod(places, number_of_rows)
        row = np.empty_like(index)
        for number in np.unique(epoch):  # one, or two at the seam
            here = epoch == number
            row[here] = permute(index[here], number_of_rows, derive_key(self.seed, number))
        return epoch, row


class EvalBatches:
    """The fixed validation batches of one process.

    Args:
        rows: rows of the held-out documents.
        objective: as TrainBatches; its form for validation is taken.
        max_samples: rows to use, spread over all of them.
        batch_size: rows in a batch. rank, ranks, device: as TrainBatches.
    """

    def __init__(self, rows, objective, max_samples, batch_size, rank, ranks, device):
        self.rows, self.objective, self.device = rows, objective.for_validation(), device
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
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
            batch = self.objective.make_batch(self.rows, row, derive_key(EVAL_SEED, row))
            for name in {self.objective.weights, "sentence_weights", "token_weights"} & batch.keys():
                batch[name][place >= len(self.chosen)] = 0
            batch["loss_denominator"] = np.float32(1)
            if self.objective.judges_tokens:
                batch["token_denominator"] = np.float32(1)
            yield batch


def to_device(batch, device):
    """Numpy arrays to tensors on the device, without waiting for it."""
    tensors = {name: torch.as_tensor(array) for name, array in batch.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
