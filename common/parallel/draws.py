"""Random weights whose numbers a process draws when it needs them, for a model that is never whole in its memory.

The model is built as always, but its parameters are on torch's meta device, without numbers. What would be written
into them is written down, with the state of the random generator before every draw, and done when a tensor is asked
for. Meanwhile the generator goes on as if all had been drawn, so the numbers are those of the ordinary construction.
"""

import math
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch.utils._python_dispatch import TorchDispatchMode

from common.memory_settings import giving_back_memory

aten = torch.ops.aten
FILL = {aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar}  # whatever was there


class Write(NamedTuple):
    """An operation in place: a function, its arguments after the tensor; size, stride and offset of the part of a
    tensor that it writes to; the generator's state before it, None where nothing is drawn."""

    function: object
    args: tuple
    options: dict
    part: tuple
    state: torch.Tensor | None


class Draw(NamedTuple):
    """How the numbers of a tensor come about: its size, its dtype, and Writes in their order."""

    size: torch.Size
    dtype: torch.dtype
    writes: list

    def numbers(self):
        """The tensor, on the CPU; the generator is left as it is."""
        whole = torch.empty(self.size, dtype=self.dtype)
        with torch.random.fork_rng(devices=[]):
            for function, args, options, part, state in self.writes:
                if state is not None:
                    torch.set_rng_state(state)
                function(whole.as_strided(*part), *args, **options)
        return whole


class Recorder(TorchDispatchMode):
    """Writes down what is done to tensors on the meta device. Attributes: found: (storage, Writes) by a storage's
    address."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable and args and torch.is_tensor(args[0]) and args[0].is_meta:
            self._record(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _record(self, func, tensor, *args, **options):
        if any(torch.is_tensor(value) and value.is_meta for value in (*args, *options.values())):
            raise NotImplementedError(f"{func} of a tensor without numbers")
        storage, part = tensor.untyped_storage(), (tensor.size(), tensor.stride(), tensor.storage_offset())
        _, writes = self.found.setdefault(storage._cdata, (storage, []))
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = torch.get_rng_state()
            func(torch.empty_strided(*part[:2], dtype=tensor.dtype), *args, **options)
        if func in FILL and tensor.nbytes == storage.nbytes():
            writes.clear()
        writes.append(Write(func, args, options, part, state))


def build_parts(accelerator, build):
    """As build_shapes, saying once where the model has to be built whole."""
    model = build_shapes(build)
    if accelerator.is_main_process and not hasattr(model, "places"):
        print("note: every process builds the model whole: its numbers depend on each other")
    return model


def build_shapes(build):
    """A model with random weights whose numbers come later.

    Args:
        build: function without arguments that returns a transformers model.
    Returns:
        the model: the parameters are on the meta device, and `model.places` is a dict of Draw by their names; or the
        model is whole, and has no `places`, where some number depends on others.
    """
    state, recorder = torch.get_rng_state(), Recorder()
    try:
        with giving_back_memory(), init_empty_weights(include_buffers=False), recorder:
            model = build()
    except (NotImplementedError, RuntimeError):  # what a tensor without numbers has no answer for
        return _whole(build, state)
    model.tie_weights()  # which registering them anew has undone
    places = {}
    for name, parameter in model.named_parameters():
        _, writes = recorder.found.get(parameter.untyped_storage()._cdata, (None, []))
        filled = writes and writes[0].function in FILL and math.prod(writes[0].part[0]) == parameter.numel()
        if not filled or not parameter.is_contiguous():
            return _whole(build, state)
        places[name] = Draw(parameter.shape, parameter.dtype, writes)
    model.places = places
    return model


def _whole(build, state):
    torch.set_rng_state(state)
    return build()
