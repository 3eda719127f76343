"""Weights and optimizer state that Colossal-AI has cut, put together to whole tensors and taken apart again."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from common.parallel.colossalai_mended import stand_ins
from common.parallel.tensors import first_names, saved_settings

with stand_ins():
    from colossalai.accelerator import get_accelerator


class Part(NamedTuple):
    """What this process holds of a parameter's master.

    numbers: fp32, in a row, perhaps none; begin: where they begin in the whole; key: by which the optimizer has their
    state, None where there are none; whole: whether every process has all of them.
    """

    numbers: torch.Tensor
    begin: int
    key: torch.Tensor | None
    whole: bool


class Parts:
    """States in parts that lie in a row, as common.parallel.state asks for them.

    Args:
        optimizer: as Booster returned it.
    """

    first_names = staticmethod(first_names)

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def rest(self, model):
        """Colossal-AI lets go of whole tensors by itself."""

    def whole_weights(self, model):
        """Yield (name, fp32 tensor on the CPU) of every parameter. Every process iterates."""
        for name, parameter in model.named_parameters():
            part = self.part(parameter)
            yield name, self._assemble(part.numbers, part, parameter.shape)

    @torch.no_grad()
    def set_whole_weights(self, model, weights):
        """Give a prepared model other weights. Args: weights: function of a name giving its whole tensor."""
        for name, parameter in model.named_parameters():
            whole, part = weights(name), self.part(parameter)
            part.numbers.copy_(whole.flatten()[part.begin : part.begin + len(part.numbers)])
            self.spread(parameter, whole)

    def whole_optimizer_state(self, optimizer, names):
        """The optimizer's state by name, with whole tensors. Every process calls it.

        Args:
            optimizer: Colossal-AI's; names: dict of parameters to names.
        Returns:
            dict: state (dict of names to dicts of tensors on the CPU and numbers), param_groups.
        """
        parts = {name: self.part(parameter) for parameter, name in names.items()}
        held = {name: self._state(part) for name, part in parts.items()}
        found = [None] * dist.get_world_size()
        mine = {n: {k: None if v.ndim else v.cpu() for k, v in values.items()} for n, values in held.items() if values}
        dist.all_gather_object(found, mine)
        layout, state = {name: values for other in found for name, values in other.items()}, {}
        for parameter, name in names.items():
            if name in layout:
                none = torch.empty(0, device=parts[name].numbers.device)
                state[name] = {
                    key: self._assemble(held[name].get(key, none), parts[name], parameter.shape)
                    if number is None
                    else number
                    for key, number in layout[name].items()
                }
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [names[p] for p in parameters],
            }
            for group, parameters in zip(self.optimizer.param_groups, self.grouped(), strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def set_whole_optimizer_state(self, optimizer, saved, names):
        """Take over what whole_optimizer_state returned, or the like of another strategy."""
        for parameter, name in names.items():
            part, values = self.part(parameter), saved["state"].get(name)
            if part.key is None or values is None:
                continue
            self.optimizer.optim.state[part.key] = {
                key: self._cut(value, part) if value.shape == parameter.shape and key != "step" else self.number(value)
                for key, value in ((key, torch.as_tensor(value)) for key, value in values.items())
            }
        for group, parameters in zip(self.optimizer.param_groups, self.grouped(), strict=True):
            group.update(saved_settings(saved, names[parameters[0]]))

    def held_state(self, optimizer):
        """The tensors of the optimizer's state that this process holds."""
        states = self.optimizer.optim.state.values()
        return [value for state in states for value in state.values() if torch.is_tensor(value)]

    def _state(self, part):
        values = {} if part.key is None else self.optimizer.optim.state.get(part.key, {})
        return {
            key: torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float32)
            for key, value in values.items()
        }

    def _cut(self, value, part):
        cut = torch.zeros_like(self.like(part))
        mine = value.flatten()[part.begin : part.begin + len(part.numbers)]
        cut[: len(mine)] = mine
        return cut

    def _assemble(self, numbers, part, shape):
        """A whole tensor out of what the processes hold of it, those of a state perhaps with a filled-up end."""
        if part.whole:
            return numbers.cpu().clone().view(shape)
        whole = torch.zeros(shape.numel(), device=get_accelerator().get_current_device())
        mine = numbers[: len(part.numbers)]
        whole[part.begin : part.begin + len(mine)] = mine
        dist.all_reduce(whole)  # of zeros, elsewhere
        return whole.view(shape).cpu()


class ZeroParts(Parts):
    """Of low-level ZeRO: equal parts of every parameter."""

    def part(self, parameter):
        """The Part of a parameter."""
        master = self.optimizer.working_to_master_param[id(parameter)]
        begin = dist.get_rank() * len(master)
        there = max(0, min(len(master), parameter.numel() - begin))
        return Part(master[:there], begin, master, whole=False)

    def like(self, part):
        """A tensor with the length and device of a state."""
        return part.key

    def number(self, value):
        """A number of a state, as the optimizer has it."""
        return value.clone()

    def spread(self, parameter, whole):
        """Give the model what its master has been given."""
        parameter.data.copy_(whole)

    def grouped(self):
        """The parameters of each group."""
        return list(self.optimizer._working_param_groups.values())

    def held_weights(self, model):
        """The parts of the weights that this process holds."""
        return [parameter.detach() for parameter in model.parameters()]


class GeminiParts(Parts):
    """Of Gemini: what of a parameter lies in this process's part of its chunk."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._keys = {p: optimizer.id_to_fake_params.get(n) for n, p in optimizer.id_to_real_params.items()}

    def part(self, parameter):
        """As ZeroParts's."""
        chunk = self.optimizer.chunk_manager.get_chunk(parameter)
        place, payload = chunk.tensors_info[parameter], chunk.paired_chunk.payload
        first = 0 if chunk.keep_gathered else chunk.shard_begin
        begin, end = max(place.offset, first), min(place.end, first + len(payload))
        numbers = payload[begin - first : max(begin, end) - first]
        return Part(numbers, begin - place.offset, self._keys[parameter], chunk.keep_gathered)

    def like(self, part):
        """As ZeroParts's."""
        return part.numbers

    def number(self, value):
        """As ZeroParts's."""
        return value.item()

    def spread(self, parameter, whole):
        """As ZeroParts's."""
        chunk = self.optimizer.chunk_manager.get_chunk(parameter)
        chunk.payload.copy_(chunk.paired_chunk.payload)
        chunk.cpu_vis_flag = False  # what is pinned in the host's memory is old

    def grouped(self):
        """As ZeroParts's."""
        by_number = self.optimizer.id_to_real_params
        return [[by_number[number] for number in group["params"]] for group in self.optimizer.param_groups_backup]

    def held_weights(self, model):
        """As ZeroParts's: the masters, as what is in bf16 comes and goes."""
        return [self.part(parameter).numbers for parameter in model.parameters()]
