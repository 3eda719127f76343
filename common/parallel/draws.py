"""Random weights whose numbers a process draws when it needs them, for a model that is never whole in its memory.

The model is built as always, but its parameters are on torch's meta device, without numbers. What would be written
into them is written down, with the state of the random generator before every draw, and done when a tensor is asked
for. Meanwhile the generator goes on as if all had been drawn, so the numbers are those of the ordinary construction.
"""

import contextlib
import math
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import TORCH_INIT_FUNCTIONS

from common.memory_settings import giving_back_memory

aten = torch.ops.aten
# What does nothing on the meta device, of its own accord; the first draws until all numbers are in bounds.
SILENT = {name: getattr(init, name) for name in ("trunc_normal_", "orthogonal_", "dirac_", "sparse_")}
FILL = {aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar}  # whatever was there
FILL |= {*SILENT.values()}
CONSTANT = {aten.zeros.default: 0.0, aten.ones.default: 1.0}
COPY = {aten.clone.default, aten.constant_pad_nd.default}  # the latter where nothing is added, as transformers does


class Write(NamedTuple):
    """An operation in place: a function, its arguments after the tensor; size, stride and offset of the part of a
    tensor that it writes to, and its dtype; the generator's state before it, None where nothing is drawn."""

    function: object
    args: tuple
    options: dict
    part: tuple
    dtype: torch.dtype
    state: torch.Tensor | None = None

    @property
    def is_random(self):
        """Whether the generator is asked."""
        return self.function in SILENT.values() or torch.Tag.nondeterministic_seeded in self.function.tags

    def drawn(self):
        """With the generator's present state; and the generator goes on."""
        state, (size, stride, _) = torch.get_rng_state(), self.part
        self.function(torch.empty_strided(size, stride, dtype=self.dtype), *self.args, **self.options)
        return self._replace(state=state)


class Draw(NamedTuple):
    """How the numbers of a tensor come about: its size, its dtype, and Writes in their order."""

    size: torch.Size
    dtype: torch.dtype
    writes: list

    def numbers(self):
        """The tensor, on the CPU; the generator is left as it is."""
        whole = torch.empty(self.size, dtype=self.dtype)
        with torch.random.fork_rng(devices=[]):
            for write in self.writes:
                if write.state is not None:
                    torch.set_rng_state(write.state)
                write.function(whole.as_strided(*write.part), *write.args, **write.options)
        return whole


class Recorder(TorchDispatchMode):
    """Writes down what is done to tensors on the meta device, whose numbers may then come later.

    What is in SILENT is seen where it is called by its name in torch.nn.init, or by transformers.

    Args:
        draws: whether the generator goes on with every draw, or waits for draw_now().
    """

    def __init__(self, draws=True):
        super().__init__()
        self._draws = draws
        self._writes, self._places = [], {}  # in their order; a storage and its places among them by its address

    def __enter__(self):
        self._put({name: partial(self._record_silent, function) for name, function in SILENT.items()})
        return super().__enter__()

    def __exit__(self, *error):
        self._put(SILENT)
        return super().__exit__(*error)

    @staticmethod
    def _put(functions):
        vars(init).update(functions)
        TORCH_INIT_FUNCTIONS.update(functions)  # which transformers calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable and args and torch.is_tensor(args[0]):
            if args[0].is_meta:
                self._record(func, *args, **kwargs)
            else:  # a constant no more
                self._places.pop(_address(args[0]), None)
        output = func(*args, **kwargs)
        if func in CONSTANT:  # on the CPU, too: it may become a parameter
            self._record(aten.fill_.Scalar, output, CONSTANT[func])
        if func in COPY and output.is_meta and output.shape == args[0].shape and args[0].is_contiguous():
            self._inherit(output, args[0])
        return output

    @contextlib.contextmanager
    def without_numbers(self):
        """Context in which modules have their parameters on the meta device, and what is tied stays tied."""
        register = torch.nn.Module.register_parameter

        def register_on_meta(module, name, parameter):
            if parameter is not None and not parameter.is_meta:
                given = parameter
                parameter = type(given)(given.to("meta"), requires_grad=given.requires_grad)
                vars(parameter).update(vars(given))
                self._inherit(parameter, given)
            register(module, name, parameter)

        torch.nn.Module.register_parameter = register_on_meta
        try:
            with self:
                yield
        finally:
            torch.nn.Module.register_parameter = register

    def draw_now(self, parameters):
        """Let the generator go on as if, of all there was, what these parameters hold had been drawn."""
        found = (
            self._places[_address(parameter)][1] for parameter in parameters if _address(parameter) in self._places
        )
        for place in sorted(place for places in found for place in places):
            if self._writes[place].is_random:
                self._writes[place] = self._writes[place].drawn()

    def draw(self, parameter):
        """The Draw of a parameter, or None where not all of its numbers have been seen to be written."""
        writes, size = self._of(parameter), parameter.numel()
        whole = [n for n, write in enumerate(writes) if write.function in FILL and math.prod(write.part[0]) == size]
        if not whole or not parameter.is_contiguous():
            return None
        return Draw(parameter.shape, parameter.dtype, writes[whole[-1] :])

    def _of(self, tensor):
        _, places = self._places.get(_address(tensor), (None, ()))
        return [self._writes[place] for place in places]

    def _record(self, func, tensor, *args, **options):
        given = (*args, *options.values())
        if any(torch.is_tensor(value) and value.is_meta for value in given):
            raise NotImplementedError(f"{func} of a tensor without numbers")
        if any(isinstance(value, torch.Generator) for value in given):
            raise NotImplementedError(f"{func} with a generator of its own")
        part = tensor.size(), tensor.stride(), tensor.storage_offset()
        write = Write(func, args, options, part, tensor.dtype)
        self._keep(tensor, write.drawn() if self._draws and write.is_random else write)

    def _record_silent(self, function, tensor, *args, **options):
        if not tensor.is_meta:
            return function(tensor, *args, **options)
        self._record(function, tensor, *args, **options)
        return tensor

    def _inherit(self, tensor, source):
        """A tensor has the numbers of another, which has the same shape."""
        for write in self._of(source):
            self._keep(tensor, write)

    def _keep(self, tensor, write):
        storage = tensor.untyped_storage()  # kept, or another might get its address
        self._places.setdefault(_address(tensor), (storage, []))[1].append(len(self._writes))
        self._writes.append(write)


def build_parts(accelerator, build):
    """As build_shapes, saying once where the model has to be built whole."""
    model = build_shapes(build)
    if accelerator.is_main_process and not hasattr(model, "places"):
        print("note: every process builds the model whole: its numbers depend on each other")
    return model


def build_shapes(build):
    """A model with random weights whose numbers come later.

    Args:
        build: function without arguments that returns a model.
    Returns:
        the model: the parameters are on the meta device, and `model.places` is a dict of Draw by their names; or the
        model is whole, and has no `places`, where some number depends on others.
    """
    state, recorder = torch.get_rng_state(), Recorder()
    try:
        with giving_back_memory(), recorder.without_numbers():
            model = build()
    except (NotImplementedError, RuntimeError):  # what a tensor without numbers has no answer for
        return _whole(build, state)
    places = {name: recorder.draw(parameter) for name, parameter in model.named_parameters()}
    if None in places.values():
        return _whole(build, state)
    model.places = places
    return model


def _whole(build, state):
    torch.set_rng_state(state)
    return build()


def _address(tensor):
    return tensor.untyped_storage()._cdata
