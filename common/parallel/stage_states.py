"""States of a model whose parameters are on several processes; see common.parallel.state."""

import torch
import torch.distributed as dist

from common.parallel import tensors


class StageStates:
    """What common.parallel.tensors does for other strategies.

    Args:
        accelerator: PipelineAccelerator, whose pipeline is there before any of these is called.
    """

    def __init__(self, accelerator):
        self._accelerator = accelerator

    @property
    def _pipeline(self):
        return self._accelerator.pipeline

    def rest(self, model):
        """Finish what is under way."""
        if self._pipeline.runner is not None:
            self._pipeline.runner.drain()

    def first_names(self, model):
        """The first name of each name of a parameter of the whole model."""
        return self._pipeline.aliases

    def whole_weights(self, model):
        """Yield (name, tensor) of every parameter of the whole model; the tensor on the main process alone."""
        pipeline, rank = self._pipeline, self._accelerator.process_index
        for name, shape in pipeline.names.items():
            owner, tensor = pipeline.exchange.rank(pipeline.exchange.owners[name][0], 0), None
            if rank == owner:
                tensor = pipeline.held[name].detach()
            if rank == owner != 0:
                dist.send(tensor.contiguous(), 0)
            elif rank == 0 != owner:
                tensor = torch.empty(shape, device=self._accelerator.device)
                dist.recv(tensor, owner)
            yield name, tensor

    def part_of_weights(self, model):
        """The weights that this process writes, by name; of what several stages hold, the first one writes it."""
        pipeline = self._pipeline
        place, owners = pipeline.exchange.place, pipeline.exchange.owners
        return {name: p.detach() for name, p in pipeline.held.items() if owners[name][0] == place}

    def parts(self, model):
        """dict: names of all parameters to the number of the part that holds them."""
        part = self._pipeline.pipe.part
        return {name: part(places[0]) for name, places in self._pipeline.exchange.owners.items()}

    @torch.no_grad()
    def set_whole_weights(self, model, weights):
        """As tensors.set_whole_weights."""
        for name, parameter in self._pipeline.held.items():
            parameter.copy_(weights(name))

    def whole_optimizer_state(self, optimizer, names):
        """As tensors.whole_optimizer_state, of the parameters here."""
        state = tensors.whole_optimizer_state(optimizer, self._names())
        return state | self._pipeline.runner.state()

    def set_whole_optimizer_state(self, optimizer, saved, names):
        """Take over this process's part of what whole_optimizer_state returned on all."""
        here = {name: values for name, values in saved["state"].items() if name in self._pipeline.held}
        tensors.set_whole_optimizer_state(optimizer, {**saved, "state": here}, self._names())
        self._pipeline.runner.set_state(saved)

    def held_weights(self, model):
        """The weights that this process holds, in each version of them."""
        return [weight for version in self._pipeline.runner.versions() for weight in version]

    def held_state(self, optimizer):
        """As tensors.held_state."""
        return tensors.held_state(optimizer)

    def _names(self):
        return {parameter: name for name, parameter in self._pipeline.held.items()}
