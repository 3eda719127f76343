"""Forward and backward passes of a stage, micro-batch by micro-batch, with what it is sent and sends on.

None waits to send, and each stage has its micro-batches in their order, forward and backward; so two processes never
wait for each other as long as each stage is at least as far ahead as those behind it (Pipe.ahead).
"""

from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.parallel.processes import derive_seed


class Pass(NamedTuple):
    """A forward pass without its backward pass.

    micro_batch: its number in the run; in_batch: in its batch; hidden: what came in, [b, S, H] or None; output: what
    went out, or the loss; mark: whatever the caller has given it.
    """

    micro_batch: int
    in_batch: int
    hidden: torch.Tensor | None
    output: torch.Tensor
    mark: Any


class Passes:
    """Those of the one stage of this process.

    Args:
        pipeline: common.parallel.pipeline.Pipeline.
    Attributes:
        stage, last: numbers of the stage and of the last one.
        waiting: of Pass, those whose backward pass is still to be made, in their order.
    """

    def __init__(self, pipeline):
        self._pipeline, self._exchange, self._pipe = pipeline, pipeline.exchange, pipeline.pipe
        (self.stage,) = pipeline.stages
        self.last = pipeline.pipe.stages - 1
        self.waiting, self._sent = deque(), deque()  # of messages under way

    def of(self, number):
        """Which micro-batches of a batch are for this process: list of numbers. Args: number: of micro-batches."""
        return [one for one in range(number) if self._pipe.place(self.stage, one) == self._exchange.place]

    def forward(self, module, part, seed, parts, in_batch, micro_batch, mark=None):
        """A forward pass.

        Args:
            module: the weights to use; part: micro-batch; seed: of its batch; parts: micro-batches in a step, whose
                loss is the mean of theirs; in_batch, micro_batch, mark: as Pass.
        Returns:
            loss on the last stage, None on others.
        """
        hidden = None
        if self.stage:
            hidden = torch.empty(self._pipeline.hidden_shape(part), device=self._pipeline.accelerator.device)
            dist.recv(hidden, self._neighbour(-1, in_batch), group=self._exchange.forward)
            hidden.requires_grad_()
        seed = derive_seed(seed, in_batch)
        output = self._pipeline.compute(module, self.stage, part, hidden, seed, micro_batch)
        loss = None
        if self.stage == self.last:
            loss = output.loss.detach()
            output = output.loss / parts
        else:
            self._send(output.detach(), self._neighbour(1, in_batch), self._exchange.forward)
        self.waiting.append(Pass(micro_batch, in_batch, hidden, output, mark))
        return loss

    def backward(self):
        """The backward pass that is due; its gradients are added to what is there. Returns: the Pass."""
        one = self.waiting.popleft()
        gradient = None
        if self.stage < self.last:
            gradient = torch.empty_like(one.output)
            dist.recv(gradient, self._neighbour(1, one.in_batch), group=self._exchange.backward)
        with self._pipeline.timed("backward", self.stage, one.micro_batch):
            one.output.backward(gradient)
        if one.hidden is not None:
            self._send(one.hidden.grad, self._neighbour(-1, one.in_batch), self._exchange.backward)
        return one

    def settle(self):
        """Wait until all that was sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _neighbour(self, step, in_batch):
        """The process that has a micro-batch on the next stage (1), or on the one before (-1)."""
        return self._exchange.rank(self._pipe.place(self.stage + step, in_batch))

    def _send(self, tensor, target, group):
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        tensor = tensor.contiguous()
        self._sent.append((dist.isend(tensor, target, group=group), tensor))
