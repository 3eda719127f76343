"""Batches one after the other through a pipeline, by a schedule of torch.distributed.pipelining.

Sources: Huang et al. 2019 (arXiv:1811.06965) for GPipe; Narayanan et al. 2021 (arXiv:2006.09503) for 1F1B with a flush
and (arXiv:2104.04473) for its interleaved form.
"""

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from common.parallel.exchange import clip
from common.parallel.processes import derive_seed

CLASSES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class Flushed:
    """Runs a batch's passes to their end before the next batch comes.

    Args:
        pipeline: common.parallel.pipeline.Pipeline; optimizer: of torch, over its parameters.
    Attributes:
        newest: number of the last micro-batch of the batches so far.
    """

    def __init__(self, pipeline, optimizer):
        self.optimizer, self.newest = optimizer, -1
        self.pipeline, self._schedules, self._scale = pipeline, {}, 1.0  # by the shape of what goes between stages
        self.parts, self.seed = [], 0

    def run(self, batch):
        """All passes of a batch; gradients are added to what is there. Returns: its loss, on every process."""
        pipeline, accelerator = self.pipeline, self.pipeline.accelerator
        count, self.seed, self.parts = pipeline.pipe.micro_batches, torch.initial_seed(), pipeline.cut(batch)
        self._scale = count * accelerator.gradient_accumulation_steps
        shape = pipeline.hidden_shape(self.parts[0])
        if shape not in self._schedules:
            self._schedules[shape] = self._make(shape)
        numbers, losses = torch.arange(count), []
        end = pipeline.pipe.place(pipeline.pipe.stages - 1)
        last = pipeline.exchange.place == end
        target = {"target": numbers, "losses": losses} if last else {}
        self._schedules[shape].step(number=numbers, return_outputs=False, **target)
        self.newest += count
        self.parts = []
        loss = torch.stack(losses).sum().detach() if last else torch.zeros((), device=accelerator.device)
        dist.broadcast(loss, pipeline.exchange.rank(end), group=pipeline.exchange.group)
        return loss * accelerator.gradient_accumulation_steps

    def put_together(self):
        """After the last batch of a step: gradients of the copies, and of what several stages use."""
        exchange, held = self.pipeline.exchange, self.pipeline.held
        exchange.average(held)
        for work in exchange.start_sharing(held).values():
            work.wait()

    def clip(self, limit):
        """Clip gradients. Returns: their norm before, over all stages."""
        work, norms = self.pipeline.exchange.start_norms(self.pipeline.held)
        work.wait()
        norm = self.pipeline.exchange.norm(norms)
        clip(self.pipeline.held, norm, limit)
        return norm

    def drain(self):
        """Nothing is left of a batch."""

    def set_mode(self, mode):
        """There is one version of the weights."""

    def versions(self):
        """The weights that are held: a list of tensors for each version."""
        return [[parameter.detach() for parameter in self.pipeline.held.values()]]

    def state(self):
        """Nothing beside weights and optimizer."""
        return {}

    def set_state(self, saved):
        """Nothing is taken over."""

    def _make(self, shape):
        pipeline, device = self.pipeline, self.pipeline.accelerator.device
        hidden = torch.empty(shape, device="meta", requires_grad=True)
        final = pipeline.pipe.stages - 1
        group, rank = pipeline.exchange.group, pipeline.exchange.rank
        # torch counts a group's processes by their ranks, whatever the stages that they have
        order = {n: dist.get_group_rank(group, rank(pipeline.pipe.place(n))) for n in range(final + 1)}
        stages = []
        for number in pipeline.stages:
            shapes = {"input_args": (hidden,) if number else ()}
            shapes["output_args"] = hidden if number < final else torch.empty((), device="meta", requires_grad=True)
            module = _Stage(self, number)
            stage = _TimedStage(module, number, final + 1, device, group=group, **shapes)
            stage.stage_index_to_group_rank = order
            stages.append(stage)
        settings = {"loss_fn": lambda loss, _: loss / self._scale, "scale_grads": False}
        kind = CLASSES[pipeline.pipe.schedule]
        return kind(stages if len(stages) > 1 else stages[0], pipeline.pipe.micro_batches, **settings)


class _TimedStage(PipelineStage):
    """torch's, whose backward passes are measured, too."""

    def backward_one_chunk(self, number, *args, **options):
        """As torch's. Args: number: of the micro-batch in its batch."""
        runner = self.submod.runner
        with runner.pipeline.timed("backward", self.stage_index, runner.newest + 1 + number):
            super().backward_one_chunk(number, *args, **options)


class _Stage(torch.nn.Module):
    """A stage as torch's schedules call it, with the number of the micro-batch."""

    def __init__(self, runner, number):
        super().__init__()
        self.runner, self.stage = runner, number

    def forward(self, hidden=None, *, number):
        pipeline, number = self.runner.pipeline, int(number)
        seed, of_run = derive_seed(self.runner.seed, number), self.runner.newest + 1 + number
        output = pipeline.compute(pipeline.module, self.stage, self.runner.parts[number], hidden, seed, of_run)
        return output if torch.is_tensor(output) else output.loss
