"""Estimates of curvature between the steps of a run, for an optimizer that asks for them.

Such an optimizer has a method update_curvature and an attribute `interval`; see common/optim/sophia.py.
"""

from itertools import count, islice

import numpy as np
import torch

from common import parallel
from common.data.masking import LABEL_STREAM, derive_key


class Curvature:
    """Before every `interval`-th step the gradient of the loss at labels that are drawn from the model itself.

    It is that of the step's own global batch and its dropout, summed over micro-batches and processes as the step's,
    not clipped, and leaves nothing behind but what the optimizer keeps. Labels are a function of the seed, the step,
    a row's place in the global batch and what the model makes of it, on any number of processes.

    Args:
        accelerator: as common.parallel.make_accelerator; model, optimizer: as it prepared them.
        seed: int.
    """

    def __init__(self, accelerator, model, optimizer, seed):
        self.accelerator, self.model, self.optimizer, self.seed = accelerator, model, optimizer, seed

    def before_steps(self, stream, steps):
        """Yield what a stream of micro-batches yields, with an estimate before each step for which it is time.

        Args:
            stream: endless iterator of (batch, number, tokens), as common.data.batches.TrainBatches yields them.
            steps: how many were made.
        """
        for step in count(steps):
            micro_batches = list(islice(stream, self.accelerator.gradient_accumulation_steps))
            if step % self.optimizer.optimizer.interval == 0:
                self.estimate(micro_batches, step)
            yield from micro_batches

    def estimate(self, micro_batches, step):
        """Let the optimizer take in an estimate.

        Args:
            micro_batches: all of a step of this process, [(batch, number, tokens)]; step: how many were made.
        """
        for batch, number, _ in micro_batches:
            with self.accelerator.accumulate(self.model):
                parallel.seed_dropout(self.seed, step, number)
                loss = self.model(**batch, label_keys=label_keys(self.seed, step, number, batch)).loss
                self.accelerator.backward(loss)
        _, ranks = parallel.data_rank(self.accelerator)
        labels = batch["loss_denominator"] * (len(micro_batches) * ranks)  # it is their mean number
        self.optimizer.optimizer.update_curvature(round(labels.item()))  # waits for the device
        self.optimizer.zero_grad()


def label_keys(seed, step, number, batch):
    """What the labels of each row of a micro-batch are drawn by.

    Args:
        seed, step: int; number: of the micro-batch in the global batch; batch: dict of tensors.
    Returns:
        [B] int64, on the batch's device.
    """
    rows = len(batch["input_ids"])
    keys = derive_key(seed, step, number * rows + np.arange(rows), LABEL_STREAM)
    return torch.from_numpy(keys.view(np.int64)).to(batch["input_ids"].device, non_blocking=True)
