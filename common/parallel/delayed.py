"""PipeDream-2BW: batches follow each other through a pipeline without a flush, with two versions of the weights.

Batch t is computed, forward and backward, with W(t-1), and W(t+1) = W(t) - rate * update(gradient of batch t), from
W(0) = W(-1) on. On a stage a batch's last backward passes are made while the next batch's first forward passes are; so
its update is made in the step after its own, with the rate and the limit of its own.
Source: Narayanan et al. 2021 (arXiv:2006.09503), section 3.

Corrected, each update is followed by what it differs by from the one before, W(t+1) = W(t) + u(t) + (u(t) - u(t-1)):
u(t), of the gradient at W(t-1), is what should have been added to W(t-1) where u(t-1) was, and the difference is made
good. Source: error feedback for updates that are a step late, Zmushko et al. 2026 (arXiv:2606.30634).
"""

import copy
from collections import deque

import torch
import torch.distributed as dist

from common.parallel.exchange import clip
from common.parallel.passes import Passes


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
        self._corrects, self._last_update = pipeline.pipe.schedule == "2bw_corrected", {}  # u(t), by name
        self._begun, self._updated = 0, 0  # batches whose passes have begun, and that the weights know
        self._passes = Passes(pipeline)
        self._complete, self._settings = deque(), deque()  # of batches before their update: gradients; rates, limit
        self._admitted, self.newest = 0, -1  # micro-batches
        self._losses, self._told = [], []  # of a batch and of the one before: for each call (work or None, loss)
        self._norm, self._limit = None, 0.0
        self._ahead = pipeline.pipe.ahead(self._passes.stage)
        self._accelerator, self._device = pipeline.accelerator, pipeline.accelerator.device

    def run(self, batch):
        """A batch's forward passes, and as many backward passes. Returns: the loss of the batch a step before.

        In the first step it is that step's own, which is waited for. Of several calls in a step, it is the mean of
        what they return: all of it comes with the last one, as the step before had perhaps fewer.
        """
        if self._modules is None:
            self._modules = self._make_versions()
        parts, seed = self.pipeline.cut(batch), torch.initial_seed()
        calls, closes = self._accelerator.gradient_accumulation_steps, self._accelerator.sync_gradients
        module, in_step = self._modules[self._begun % 2], len(parts) * calls
        loss, own = torch.zeros((), device=self._device), self._passes.of(len(parts))
        for number in own:
            # which batch's last one of this process it is, and the number of the batch's last one
            mark = (self._begun, self._admitted + len(parts) - 1) if closes and number == own[-1] else None
            of_part = self._passes.forward(module, parts[number], seed, in_step, number, self._admitted + number, mark)
            if of_part is not None:
                loss += of_part / len(parts)
            if len(self._passes.waiting) > self._ahead:
                self._backward()
        self._admitted += len(parts)
        self._begun += closes
        return self._tell_loss(loss, calls, closes)

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
        while self._passes.waiting:
            self._backward()
        while self._updated < self._begun:
            self._update()
        self._passes.settle()

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
            dict: previous, update (dicts of tensors by name; update of a corrected one), told_losses (list of
            tensors), told_norm (tensor or None).
        """
        older = self._parameters(self._updated % 2) if self._modules else {}
        previous = {name: parameter.detach() for name, parameter in older.items()}
        told = {"told_losses": _waited_for(self._told), "told_norm": self._norm}
        return {"previous": previous, "update": self._last_update, **told}

    def set_state(self, saved):
        """Take over what state() returned; of another strategy, begin with one version."""
        self._previous = saved.get("previous")
        update = saved.get("update", {}) if self._corrects else {}
        self._last_update = {name: update[name].to(self._device) for name in self.pipeline.held if name in update}
        self._told = [(None, loss.to(self._device)) for loss in saved.get("told_losses", ())]
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

    def _backward(self):
        if mark := self._passes.backward().mark:
            batch, last = mark
            self._complete.append((last, *self._put_together(self._parameters(batch % 2))))

    def _put_together(self, held):
        """Begin what the processes make of a batch's gradients; none waits for one that waits for it.

        A stage's last gradient is sent before it waits for its copies and for those to which its micro-batches are
        dealt out; and what stages share is waited for by the first one alone, which is the last to have it.
        """
        self._exchange.average(held)
        works, norms = self._exchange.start_sharing(held), None
        if self._accelerator.max_grad_norm > 0:
            for name, work in works.items():
                if self._exchange.gives_norm(name):
                    work.wait()
            norms = self._exchange.start_norms(held)
        return works.values(), norms

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
        if self._corrects:
            self._correct(older, newest)
        self.pipeline.module, self.pipeline.held = self._modules[self._updated % 2], older
        self._updated += 1

    def _correct(self, made, before):
        """Add to an update what it differs by from the last one. Args: made, before: weights by name."""
        update = dict(zip(made, torch._foreach_sub(list(made.values()), list(before.values())), strict=True))
        if self._last_update:
            last = [self._last_update[name] for name in made]
            torch._foreach_add_(list(made.values()), torch._foreach_sub(list(update.values()), last))
        self._last_update = update

    def _hand_over(self, successors):
        """Let the optimizer go on with the parameters of the other version."""
        state = self.optimizer.state
        for group in self.optimizer.param_groups:
            group["params"] = [successors[parameter] for parameter in group["params"]]
        for parameter, successor in successors.items():
            if parameter in state:
                state[successor] = state.pop(parameter)

    def _tell_loss(self, part, calls, closes):
        """Begin to tell the other stages a loss.

        Args:
            part: what of it was computed here; calls: that make a step; closes: whether this is the last one.
        Returns:
            as run.
        """
        self._losses.append((dist.all_reduce(part, group=self._exchange.losses, async_op=True), part))
        if not closes:
            return torch.zeros_like(part)
        told = torch.stack(_waited_for(self._told or self._losses)).mean()
        self._losses, self._told = [], self._losses
        return calls * told


def _waited_for(losses):
    """Losses as soon as all stages have told them. Args: losses: of pairs (work or None, loss)."""
    for work, _ in losses:
        if work:
            work.wait()
    return [loss for _, loss in losses]


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
