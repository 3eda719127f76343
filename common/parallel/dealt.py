"""Batches one after the other through stages of which some are on more processes than others.

The micro-batches of a batch are dealt out to the processes of each stage in turn, and their gradients summed over
them; torch's schedules know no such stages. Source: Narayanan et al. 2019 (PipeDream), section 3.2.
"""

import torch
import torch.distributed as dist

from common.parallel.flushed import Flushed
from common.parallel.passes import Passes


class Dealt(Flushed):
    """As Flushed, with passes in the order of GPipe or 1F1B. Args: as Flushed."""

    def __init__(self, pipeline, optimizer):
        super().__init__(pipeline, optimizer)
        self._passes = Passes(pipeline)
        pipe = pipeline.pipe
        self._ahead = pipe.micro_batches if pipe.schedule == "gpipe" else pipe.ahead(self._passes.stage)

    def run(self, batch):
        """As Flushed.run."""
        pipeline, passes, accelerator = self.pipeline, self._passes, self.pipeline.accelerator
        parts, seed = pipeline.cut(batch), torch.initial_seed()
        scale = len(parts) * accelerator.gradient_accumulation_steps
        loss = torch.zeros((), device=accelerator.device)
        for number in passes.of(len(parts)):
            of_part = passes.forward(pipeline.module, parts[number], seed, scale, number, self.newest + 1 + number)
            if of_part is not None:
                loss += of_part / len(parts)
            if len(passes.waiting) > self._ahead:
                passes.backward()
        while passes.waiting:
            passes.backward()
        passes.settle()
        self.newest += len(parts)
        dist.all_reduce(loss, group=pipeline.exchange.group)
        return loss
