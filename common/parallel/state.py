"""Weights and optimizer state of a run in training, on disk and back, and the final weights as one dict.

Under every strategy a checkpoint holds whole tensors under the names of the plain model, so that another strategy, or
another number of processes, can continue from it. Where processes hold different tensors, each writes a file of its
own, with Hugging Face's names for the parts of a large model, and from_pretrained puts them together.
"""

import contextlib
import json
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError, first_line
from common.parallel.processes import raise_together

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OPTIMIZER = "optimizer.pt"
OPTIMIZER_STATE = ("state", "previous", "update")  # dicts by name, of which each part of a checkpoint has some
TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "file write failed")  # torch.save's words for it


def plain_model(model):
    """The transformers model inside what accelerator.prepare returned.

    accelerate's own unwrap_model imports DeepSpeed where it is installed, which takes seconds.
    """
    return getattr(model, "module", model)


def save_training_state(accelerator, model, optimizer, folder):
    """Write weights and optimizer state. Every process calls it; the main one writes.

    Args:
        model, optimizer: as accelerator.prepare returned them.
        folder: Path that exists.
    Raises:
        UserError: on every process, where a file of one cannot be written.
    """
    plain = _at_rest(accelerator, model)
    number, parts = accelerator.checkpoint_part
    with _writing(accelerator) as write:
        if parts == 1:
            _save_whole_weights(accelerator, plain, folder / WEIGHTS, write)
        else:
            _save_part_of_weights(accelerator, plain, folder, number, parts, write)
        state = accelerator.states.whole_optimizer_state(optimizer.optimizer, _names(plain))
        if number is not None:
            state = {**state, "scaler": accelerator.loss_scale_state(optimizer)}
            write(torch.save, state, folder / _part(OPTIMIZER, number, parts))
        if accelerator.is_main_process:
            write(plain.config.save_pretrained, folder)  # so that from_pretrained can load it, too


def load_training_state(accelerator, model, optimizer, folder):
    """Read back what save_training_state wrote, into the same objects. Nothing but tensors and numbers is unpickled.

    Raises:
        UserError: the optimizer keeps something else in its state.
    """
    plain, states = _at_rest(accelerator, model), accelerator.states
    load_weights(accelerator, model, folder / WEIGHTS)
    try:
        state = _read_optimizer(folder)
    except UnpicklingError as error:
        raise UserError(
            f"{folder / OPTIMIZER}: this optimizer keeps more than tensors and numbers in its state, which is not "
            "unpickled; let its state_dict hold plain values"
        ) from error
    states.set_whole_optimizer_state(optimizer.optimizer, state, _names(plain))
    if state["scaler"]:
        accelerator.set_loss_scale_state(optimizer, state["scaler"])


def save_weights(accelerator, model, path):
    """Write the whole weights. Every process calls it; the main one writes.

    Raises:
        UserError: on every process, where it cannot.
    """
    with _writing(accelerator) as write:
        _save_whole_weights(accelerator, _at_rest(accelerator, model), path, write)


def load_weights(accelerator, model, path):
    """Give a model the weights that save_weights wrote, or the parts of a checkpoint. Every process calls it."""
    plain = _at_rest(accelerator, model)
    with weights_reader(path) as read:
        accelerator.states.set_whole_weights(plain, read)
        for name, buffer in _buffers(plain).items():
            buffer.copy_(read(name))


@contextlib.contextmanager
def weights_reader(path):
    """A function of a name giving its tensor, of a file or of the parts that are there in its place.

    Args:
        path: Path of the file.
    """
    index = path.with_name(INDEX)
    with contextlib.ExitStack() as stack:
        if path.exists() or not index.exists():
            yield stack.enter_context(safe_open(path, framework="pt")).get_tensor
            return
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
        files = {name: stack.enter_context(safe_open(path.with_name(name), framework="pt")) for name in names}
        yield lambda name: files[places[name]].get_tensor(name)


def held_weights(accelerator, model):
    """The parts of the weights that this process holds between two steps; what is written into them stays."""
    return accelerator.states.held_weights(_at_rest(accelerator, model))


def consolidated_weights(accelerator, model):
    """The whole model's weights on the main process. Every process calls it.

    Returns:
        dict of names of the plain model to tensors, as save_pretrained(state_dict=...) takes it.
    """
    plain = _at_rest(accelerator, model)
    weights, first_names = _whole_weights(accelerator, plain), accelerator.states.first_names(plain)
    every = {name: weights[first] for name, first in first_names.items()} if weights else {}  # tied ones, too
    return weights | every


def bytes_per_rank(accelerator, model, optimizer):
    """(parameter bytes, optimizer state bytes) that this process holds."""
    plain, states = _at_rest(accelerator, model), accelerator.states
    held = states.held_weights(plain), states.held_state(optimizer.optimizer)
    return tuple(sum(tensor.numel() * tensor.element_size() for tensor in tensors) for tensors in held)


def all_finite(accelerator, model):
    """Whether no process holds a weight that is NaN or infinite. Every process calls it."""
    held = accelerator.states.held_weights(_at_rest(accelerator, model))
    infinite = torch.stack([~torch.isfinite(tensor).all() for tensor in held]).any()
    return not accelerator.reduce(infinite.float()).item()


def _at_rest(accelerator, model):
    """The plain model, holding between two steps what the strategy lets it hold."""
    plain = plain_model(model)
    accelerator.states.rest(plain)
    return plain


def _whole_weights(accelerator, model):
    """Parameters and persistent buffers by name, tied ones once; {} on all but the main process."""
    weights = _buffers(model) if accelerator.is_main_process else {}
    for name, tensor in accelerator.states.whole_weights(model):
        if accelerator.is_main_process:
            weights[name] = tensor
    return weights


@contextlib.contextmanager
def _writing(accelerator):
    """Context in which processes write files between what all of them do together, which goes on where a file fails.

    It gives a function that calls another one, with its arguments, unless a file of this process has failed.

    Raises:
        UserError: at the end, on every process, where a file of one has failed.
    """
    faults = []

    def write(function, *args, **options):
        if faults:
            return
        try:
            function(*args, **options)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_CANNOT_WRITE):
                raise
            faults.append(first_line(error))

    def judge():
        if faults:
            raise UserError(faults[0])

    yield write
    raise_together(accelerator, judge)


def _save_whole_weights(accelerator, plain, path, write):
    weights = _whole_weights(accelerator, plain)
    if accelerator.is_main_process:
        write(save_file, weights, path, metadata={"format": "pt"})


def _save_part_of_weights(accelerator, plain, folder, number, parts, write):
    """Write what this process holds of the weights, and on the main process which part holds what."""
    states, buffers = accelerator.states, _buffers(plain)
    if number is not None:
        weights = states.part_of_weights(plain) | (buffers if number == 0 else {})
        write(save_file, weights, folder / _part(WEIGHTS, number, parts), metadata={"format": "pt"})
    if accelerator.is_main_process:
        places = dict.fromkeys(buffers, 0) | states.parts(plain)
        index = {"metadata": {}, "weight_map": {name: _part(WEIGHTS, place, parts) for name, place in places.items()}}
        write((folder / INDEX).write_text, json.dumps(index, indent=1))


def _part(name, number, parts):
    """The name of a part of a file, as Hugging Face's."""
    stem, dot, kind = name.rpartition(".")
    return name if parts == 1 else f"{stem}-{number + 1:05}-of-{parts:05}{dot}{kind}"


def _read_optimizer(folder):
    """The optimizer's state, put together of its parts; tensors stay in their files until they are looked at."""
    stem, _, kind = OPTIMIZER.rpartition(".")
    paths = sorted(folder.glob(f"{stem}-*-of-*.{kind}")) or [folder / OPTIMIZER]
    first, *others = (torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths)
    for other in others:
        for key in OPTIMIZER_STATE:
            first.setdefault(key, {}).update(other.get(key, {}))
        first["param_groups"] += other["param_groups"]
    return first


def _names(model):
    """The first name of each parameter."""
    return {parameter: name for name, parameter in model.named_parameters()}


def _buffers(model):
    """Persistent buffers by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
