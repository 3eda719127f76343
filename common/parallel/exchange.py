"""What the processes of a pipeline, and those of its copies, tell each other beside activations: gradients and norms.

The place of a process is its number among those of its pipeline, from 0 on.
"""

import torch
import torch.distributed as dist


class Exchange:
    """Gradients of parameters that several processes hold, and the norm of all of a model's. Every process makes one.

    Args:
        pipe: common.parallel.launch.Pipe; index, world: number of this process and of all.
        owners: for each parameter of the whole model, by name in the model's order, the places that hold it.
    Attributes:
        copy, place: of this process; copies: of the pipeline.
        group, forward, backward, losses: process groups of one pipeline, each for messages of one kind.
    """

    def __init__(self, pipe, index, world, owners):
        self.copies = world // pipe.processes
        self.copy, self.place = pipe.seat(index)
        self._pipe, self.owners = pipe, owners
        self._numbers = {name: number for number, name in enumerate(owners)}
        everywhere = tuple(range(pipe.processes))
        self.group, self.forward, self.backward, self.losses, self._norms = (
            self._own_group(everywhere) for _ in range(5)
        )
        shared = sorted({places for places in owners.values() if len(places) > 1})
        self._sharing = {places: self._own_group(places) for places in shared}
        alike = [dist.new_group([pipe.rank(copy, place) for copy in range(self.copies)]) for place in everywhere]
        self._copies = alike[self.place]
        self._with_gradient = None  # which parameters have one

    def _own_group(self, places):
        """The group of these places in the pipeline of this process; groups are made by all processes together."""
        groups = [dist.new_group([self.rank(place, copy) for place in places]) for copy in range(self.copies)]
        return groups[self.copy]

    def rank(self, place, copy=None):
        """The number of a process among all. Args: place: in its pipeline; copy: None for the own one."""
        return self._pipe.rank(self.copy if copy is None else copy, place)

    def average(self, held):
        """Give gradients the mean over the copies. Args: held: dict of parameters by name."""
        gradients = [parameter.grad for parameter in held.values() if parameter.grad is not None]
        if self.copies > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self._copies)
            flat /= self.copies
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def start_sharing(self, held):
        """Begin to sum the gradients of what several places hold, as a tied embedding, into each of its copies.

        Args:
            held: as average.
        Returns:
            dict of works to wait for, by the name of the parameter.
        """
        shared = {name: p.grad for name, p in held.items() if len(self.owners[name]) > 1 and p.grad is not None}
        groups = {name: self._sharing[self.owners[name]] for name in shared}
        return {name: dist.all_reduce(shared[name], group=groups[name], async_op=True) for name in shared}

    def start_norms(self, held):
        """Begin to collect the norm of each parameter's gradient; of what is shared, the first place gives it.

        One entry for each parameter of the whole model, so that whatever the stages, the norm over all is that of one
        process to the last bit; -1 where there is no gradient.

        Args:
            held: as average.
        Returns:
            (work, [parameters] float32).
        """
        own = {name: p for name, p in held.items() if self.gives_norm(name)}
        device = next(iter(held.values())).device
        norms = torch.zeros(len(self.owners), device=device)
        if own:
            places = torch.tensor([self._numbers[name] for name in own], device=device)
            none = torch.tensor(-1.0, device=device)
            norms[places] = torch.stack([none if p.grad is None else p.grad.norm() for p in own.values()])
        return dist.all_reduce(norms, group=self._norms, async_op=True), norms

    def norm(self, norms):
        """The norm over all parameters. Args: norms: what start_norms has collected. Returns: scalar tensor."""
        if self._with_gradient is None:  # the same in every step; to ask waits for the device
            self._with_gradient = (norms >= 0).nonzero()[:, 0]
        return torch.linalg.vector_norm(norms[self._with_gradient])

    def gives_norm(self, name):
        """Whether this process gives the norm of a parameter's gradient to the others."""
        return self.owners[name][0] == self.place


def clip(held, norm, limit):
    """Scale gradients so that the norm over all stages is at most a limit.

    Args:
        held: dict of parameters by name; norm: over all stages, scalar tensor; limit: float.
    """
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for parameter in held.values():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
