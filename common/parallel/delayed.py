"""PipeDream-2BW: batches follow each other through a pipeline without a flush, with two versions of the weights.

Batch t is computed, forward and backward, with W(t-1), and W(t+1) = W(t) - rate * update(gradient of batch t), from
W(0) = W(-1) on. On a stage a batch's last backward passes are made while the next batch's first forward passes are; so
its update is made in the step after its own, with the rate and the limit of its own.
Source: Narayanan et al. 2021 (arXiv:2006.09503), section 3.
"""

import copy
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist

from common.parallel.exchange import clip
from common.parallel.processes import derive_seed


class _Pass(NamedTuple):
    """A forward pass without its backward pass.

    batch, micro_batch: numbers in the run; closes: whether it is the batch's last one.
    """

    batch: int
    micro_batch: int
    closes: bool
    hidden: torch.Tensor | None
    output: torch.Tensor


class Delayed:
    """Runs a batch's forward passes, and backward passes as they become due, some of the batch before.

    On each of two copies of the model, batches with even and odd numbers: one's gradients are complete, and it becomes
    the next version, while the other one is computed with.

    Args:
        pipeline: common.parallel.pipeline.Pipeline, of one stage; optimizer: of torch, over its parameters.
    Attributes:
        newest: number of the last micro-batch whose gradient the update has that is being made.
    """

    def __init__(self, pipeline, optimizer):
        self.pipeline, self.optimizer, self._exchange = pipeline, optimizer, pipeline.exchange
        self._modules, self._previous = None, None  # the older version, as a checkpoint has it, before there are two
        self._begun, self._updated = 0, 0  # batches whose passes have begun, and that the weights know
        self._waiting, self._sent = deque(), deque()  # _Pass; messages under way
        self._complete, self._settings = deque(), deque()  # of batches before their update: gradients; rates, limit
        self._admitted, self.newest = 0, -1  # micro-batches
        self._losses, self._norm, self._limit = deque(), None, 0.0
        (self._stage,) = pipeline.stages
        self._last = pipeline.pipe.stages - 1
        accelerator = pipeline.accelerator
        self._before, self._after = self._exchange.neighbours
        self._accelerator, self._device = accelerator, accelerator.device

    def run(self, batch):
        """A batch's forward passes, and as many backward passes. Returns: the loss of the batch a step before.

        In the first step it is that step's own, which is waited for.
        """
        if self._modules is None:
            self._modules = self._make_versions()
        parts, seed, losses = self.pipeline.cut(batch), torch.initial_seed(), []
        calls, closes = self._accelerator.gradient_accumulation_steps, self._accelerator.sync_gradients
        for number, part in enumerate(parts):
            closing = closes and number == len(parts) - 1
            losses.append(self._forward(part, derive_seed(seed, number), closing, len(parts) * calls))
            if len(self._waiting) > self._last - self._stage:
                self._backward()
        self._begun += closes
        return self._tell_loss(losses, calls)

    def put_together(self):
        """Done as soon as a batch is complete."""

    def clip(self, limit):
        """Remember the limit for this batch.

        Args:
            limit: of the norm.
        Returns:
            norm of the gradient of the batch before, scalar tensor; None where there is none.
        """
        self._limit = limit
        if self._updated < self._begun - 1:
            work, norms = self._complete[0][2]
            work.wait()
            self._norm = self._exchange.norm(norms)
        return self._norm

    def step(self):
        """Remember the rates for this batch, and make the update of the one before unless a drain has."""
        self._settings.append(([group["lr"] for group in self.optimizer.param_groups], self._limit))
        if self._updated < self._begun - 1:
            self._update()

    def drain(self):
        """Make the backward passes and updates that are left; what comes after computes the same as without."""
        while self._waiting:
            self._backward()
        while self._updated < self._begun:
            self._update()
        while self._sent:
            self._sent.popleft()[0].wait()

    def set_mode(self, mode):
        """Training or evaluation, for both versions."""
        for module in self._modules or ():
            module.train(mode)

    def versions(self):
        """The weights that are held: a list of tensors for each version."""
        modules = self._modules or [self.pipeline.module]
        return [[parameter.detach() for parameter in module.parameters()] for module in modules]

    def state(self):
        """What a drained pipeline must remember beside weights and optimizer: the older weights, and what it has told.

        Returns:
            dict: previous (dict of tensors by name), told_losses (list of tensors), told_norm (tensor or None).
        """
        older = self._parameters(self._updated % 2) if self._modules else {}
        for work, _ in self._losses:
            if work:
                work.wait()
        previous = {name: parameter.detach() for name, parameter in older.items()}
        return {"previous": previous, "told_losses": [loss for _, loss in self._losses], "told_norm": self._norm}

    def set_state(self, saved):
        """Take over what state() returned; of another strategy, begin with one version."""
        self._previous = saved.get("previous")
        self._losses = deque((None, loss.to(self._device)) for loss in saved.get("told_losses", ()))
        self._norm = saved.get("told_norm")

    def _make_versions(self):
        newest = self.pipeline.module
        older = copy.deepcopy(newest)
        modules = [older, newest]  # batch 0 is computed with the older one
        if self._previous:
            with torch.no_grad():
                for mine, name in zip(older.parameters(), self._names(), strict=True):
                    mine.copy_(self._previous[name])
        return modules

    def _names(self):
        names = {parameter: name for name, parameter in self.pipeline.held.items()}
        return [names[parameter] for parameter in self.pipeline.module.parameters()]

    def _parameters(self, version):
        """Parameters of a version by their names in the whole model."""
        return dict(zip(self._names(), self._modules[version].parameters(), strict=True))

    def _forward(self, part, seed, closes, micro_batches):
        """Returns: the loss on the last stage, None on others."""
        hidden = None
        if self._stage:
            hidden = self._receive(part, self._before, self._exchange.forward).requires_grad_()
        number, module = self._admitted, self._modules[self._begun % 2]
        output = self.pipeline.compute(module, self._stage, part, hidden, seed, number)
        loss = None
        if self._stage == self._last:
            loss = output.loss.detach()
            output = output.loss / micro_batches
        else:
            self._send(output.detach(), self._after, self._exchange.forward)
        self._waiting.append(_Pass(self._begun, number, closes, hidden, output))
        self._admitted += 1
        return loss

    def _backward(self):
        batch, number, closes, hidden, output = self._waiting.popleft()
        gradient = None
        if self._stage < self._last:
            gradient = torch.empty_like(output)
            dist.recv(gradient, self._after, group=self._exchange.backward)
        with self.pipeline.timed("backward", self._stage, number):
            output.backward(gradient)
        if hidden is not None:
            self._send(hidden.grad, self._before, self._exchange.backward)
        if closes:
            self._complete.append((number, *self._put_together(self._parameters(batch % 2))))

    def _put_together(self, held):
        """Begin what the processes make of a batch's gradients; none waits for one that waits for it.

        A stage's last gradient is sent before it waits for its copies; and what is shared is summed by the stage that
        is the last to have it.
        """
        self._exchange.average(held)
        works, norms = self._exchange.start_sharing(held), None
        if self._accelerator.max_grad_norm > 0:
            if self._exchange.owns_shared(held):
                for work in works:
                    work.wait()
            norms = self._exchange.start_norms(held)
        return works, norms

    @torch.no_grad()
    def _update(self):
        (self.newest, works, norms), (rates, limit) = self._complete.popleft(), self._settings.popleft()
        older, newest = (
            self._parameters((self._updated + step) % 2) for step in (0, 1)
        )  # the older has the gradients
        for work in works:
            work.wait()
        if norms is not None:
            norms[0].wait()
            self._norm = self._exchange.norm(norms[1])
            clip(older, self._norm, limit)
        torch._foreach_copy_(list(older.values()), list(newest.values()))
        self._hand_over(dict(zip(newest.values(), older.values(), strict=True)))
        later = [group["lr"] for group in self.optimizer.param_groups]
        for chosen in (rates, later):
            for group, rate in zip(self.optimizer.param_groups, chosen, strict=True):
                group["lr"] = rate
            if chosen is rates:
                self.optimizer.step()
        self.optimizer.zero_grad()
        self.pipeline.module, self.pipeline.held = self._modules[self._updated % 2], older
        self._updated += 1

    def _hand_over(self, successors):
        """Let the optimizer go on with the parameters of the other version."""
        state = self.optimizer.state
        for group in self.optimizer.param_groups:
            group["params"] = [successors[parameter] for parameter in group["params"]]
        for parameter, successor in successors.items():
            if parameter in state:
                state[successor] = state.pop(parameter)

    def _tell_loss(self, losses, calls):
        """Begin to tell the other stages a loss. Returns: the one of as many calls ago as make a step."""
        told = torch.zeros((), device=self._device)
        if self._stage == self._last:
            told = torch.stack(losses).mean()
        source = self._exchange.rank(self._last)
        self._losses.append((dist.broadcast(told, source, group=self._exchange.losses, async_op=True), told))
        while len(self._losses) > calls + 1:
            self._losses.popleft()
        work, loss = self._losses.popleft() if len(self._losses) > calls else self._losses[-1]
        if work:
            work.wait()
        return loss.clone()

    def _receive(self, part, source, group):
        tensor = torch.empty(self.pipeline.hidden_shape(part), device=self._device)
        dist.recv(tensor, source, group=group)
        return tensor

    def _send(self, tensor, target, group):
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        tensor = tensor.contiguous()
        self._sent.append((dist.isend(tensor, target, group=group), tensor))


class DelayedOptimizer:
    """As accelerate's wrapper of an optimizer, for one whose updates Delayed makes.

    Args:
        runner: Delayed.
    """

    step_was_skipped = False

    def __init__(self, runner):
        self._runner, self.optimizer = runner, runner.optimizer

    @property
    def param_groups(self):
        """The optimizer's."""
        return self.optimizer.param_groups

    def step(self):
        """At the end of a batch, as Delayed.step."""
        if self._runner.pipeline.accelerator.sync_gradients:
            self._runner.step()

    def zero_grad(self):
        """Gradients of a batch go with its update."""
