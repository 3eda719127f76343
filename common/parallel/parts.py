"""Weights of which a process reads the parts that it will hold, for a model that is never whole in its own memory.

The model is built without numbers, on torch's meta device; once it is cut, each tensor's file is mapped into memory
and the part is taken out of it, in whatever precision it is there. What is mapped is the system's cache of the file,
which all processes of a machine share. Where an engine can only cut tensors that have numbers, they are read one
module's at a time. Only safetensors can be read so, under the names that the model itself uses.
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from common.memory_settings import giving_back_memory
from common.models.whole import load_whole
from common.parallel import tensors
from common.parallel.draws import Recorder

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Place(NamedTuple):
    """Where a tensor lies: a Path, and its name there."""

    file: Path
    key: str


def load_parts(accelerator, auto_class, name, **options):
    """As load_shapes, saying once where the model has to be read whole."""
    model, info = load_shapes(auto_class, name, **options)
    if accelerator.is_main_process and not hasattr(model, "places"):
        print(f"note: every process reads {name} whole: its weights are no safetensors with the names of today")
    return model, info


@giving_back_memory()  # what is read or made here is soon freed, and would leave room in which later blocks stay
def load_shapes(auto_class, name, **options):
    """As auto_class.from_pretrained with output_loading_info, but for the numbers of the parameters.

    Every file is opened, and names and shapes are compared with the model's. What is in no file is drawn at random, as
    from_pretrained does.

    Args:
        auto_class: of transformers; name: folder or hub name; options: of from_pretrained.
    Returns:
        (model, info): the parameters are on the meta device and `model.places` is a dict of Place, or Draw, by their
        names and those of persistent buffers; or the model is whole, and has no `places`, where it cannot be read in
        parts.
    Raises:
        what from_pretrained does.
    """
    state, recorder = torch.get_rng_state(), Recorder(draws=False)
    with recorder:
        model, info = load_whole(auto_class, name, device_map="meta", **options)
    lost = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    recorder.draw_now(parameter for name, parameter in model.named_parameters() if name in lost)
    places = _places(model, name, options.get("cache_dir"), recorder, lost)
    if places is None:
        torch.set_rng_state(state)
        return load_whole(auto_class, name, **options)
    model.places = places
    with init_empty_weights(include_buffers=False):
        twin = type(model)(model.config)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        module._buffers.update(other._buffers)
    return model, info


@torch.no_grad()
def fill(model, device):
    """Read the numbers of a model that load_shapes has returned and that was cut, or not.

    Args:
        model: parameters on the meta device, DTensors among them; device: where the parts are to be held.
    """
    empty = {p: torch.nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in model.parameters()}
    replace(model, empty)
    with whole_numbers(model) as read:
        tensors.set_whole_weights(model, read)


@torch.no_grad()
def fill_in_turn(model, cut):
    """Read the numbers of a model that load_shapes has returned and cut them, a module at a time.

    Args:
        model: parameters on the meta device, none of them cut.
        cut: function of a module, those in which have been cut, that leaves to this process its part of the others.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    with whole_numbers(model) as read:
        for module in reversed(list(model.modules())):  # what is in a module comes before it
            waiting = [parameter for parameter in module.parameters(recurse=False) if parameter in names]
            if waiting:
                whole = {p: torch.empty_like(p, device="cpu").copy_(read(names.pop(p))) for p in waiting}
                replace(model, {p: torch.nn.Parameter(numbers, p.requires_grad) for p, numbers in whole.items()})
                del whole
                cut(module)


def replace(model, parameters):
    """Put other parameters in the places of a model's; what is tied stays tied.

    Args:
        parameters: dict of the parameters that the model has to those that it is to have.
    """
    for module in model.modules():
        here = {name: parameters[p] for name, p in module._parameters.items() if p in parameters}
        module._parameters.update(here)


@contextlib.contextmanager
def whole_numbers(model):
    """A function of a parameter's name giving its whole tensor, for a model with `places`; at the end buffers are
    read, too."""
    with contextlib.ExitStack() as stack:
        files = {place.file for place in model.places.values() if isinstance(place, Place)}
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}

        def read(name):
            place = model.places[name]
            return opened[place.file].get_tensor(place.key) if isinstance(place, Place) else place.numbers()

        yield read
        for name, buffer in model.named_buffers():
            if name in model.places:
                buffer.copy_(read(name))
    del model.places


def _places(model, name, cache_dir, recorder, lost):
    """The Place or Draw of each parameter and persistent buffer by its first name, or None where one has none."""
    folder = _folder(name, cache_dir)
    names = [file for file in (WHOLE, INDEX) if folder and (folder / file).is_file()]
    tensors_by_name = model.state_dict(keep_vars=True)  # tied ones under each of their names
    # where both of a tied pair have a file, transformers compares them, and where it has changed names, it knows how
    apart = any(tensors_by_name[one] is not tensors_by_name[two] for one, two in model.all_tied_weights_keys.items())
    if not names or apart or model._weight_conversions:
        return None
    files = {names[0]} if names[0] == WHOLE else set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    there = {}
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as opened:
            there.update({key: Place(folder / file, key) for key in opened.keys()})
    prefix = f"{model.base_model_prefix}."
    found, first = {}, {}
    for alias, tensor in tensors_by_name.items():
        own = first.setdefault(tensor, alias)
        key = next((key for key in (alias, prefix + alias, alias.removeprefix(prefix)) if key in there), None)
        place = recorder.draw(tensor) if alias in lost else there.get(key)
        if place and own not in found:
            found[own] = place
    return found if found.keys() == set(first.values()) else None


def _folder(name, cache_dir):
    """Where from_pretrained has found or put the files of a model."""
    if Path(name).is_dir():
        return Path(name)
    found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir)
    return Path(found).parent if isinstance(found, str) else None
