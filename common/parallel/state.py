"""Weights and optimizer state of a run in training, on disk and back, and the final weights as one dict.

Under every strategy a checkpoint holds whole tensors under the names of the plain model, so that another strategy, or
another number of processes, can continue from it.
"""

from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import UserError

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"


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
    """
    plain = _at_rest(accelerator, model)
    save_weights(accelerator, model, folder / WEIGHTS)
    state = accelerator.states.whole_optimizer_state(optimizer.optimizer, _names(plain))
    if accelerator.is_main_process:
        plain.config.save_pretrained(folder)  # so that from_pretrained can load it, too
        scaler = accelerator.loss_scale_state(optimizer)
        torch.save({**state, "scaler": scaler}, folder / OPTIMIZER)


def load_training_state(accelerator, model, optimizer, folder):
    """Read back what save_training_state wrote, into the same objects. Nothing but tensors and numbers is unpickled.

    Raises:
        UserError: the optimizer keeps something else in its state.
    """
    plain, states = _at_rest(accelerator, model), accelerator.states
    load_weights(accelerator, model, folder / WEIGHTS)
    try:
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{folder / OPTIMIZER}: this optimizer keeps more than tensors and numbers in its state, which is not "
            "unpickled; let its state_dict hold plain values"
        ) from error
    states.set_whole_optimizer_state(optimizer.optimizer, state, _names(plain))
    if state["scaler"]:
        accelerator.set_loss_scale_state(optimizer, state["scaler"])


def save_weights(accelerator, model, path):
    """Write the whole weights. Every process calls it; the main one writes."""
    weights = _whole_weights(accelerator, _at_rest(accelerator, model))
    if accelerator.is_main_process:
        save_file(weights, path, metadata={"format": "pt"})


def load_weights(accelerator, model, path):
    """Give a model the weights that save_weights wrote. Every process calls it."""
    plain = _at_rest(accelerator, model)
    with safe_open(path, framework="pt") as file:
        accelerator.states.set_whole_weights(plain, file.get_tensor)
        for name, buffer in _buffers(plain).items():
            buffer.copy_(file.get_tensor(name))


def held_weights(accelerator, model):
    """The parts of the weights that this process holds between two steps; what is written into them stays."""
    return accelerator.states.held_weights(_at_rest(accelerator, model))


def consolidated_weights(accelerator, model):
    """The whole model's weights on the main process. Every process calls it.

    Returns:
        dict of names of the plain model to tensors, as save_pretrained(state_dict=...) takes it.
    """
    plain = _at_rest(accelerator, model)
    weights, names = _whole_weights(accelerator, plain), _names(plain)
    every_name = plain.named_parameters(remove_duplicate=False)  # tied ones too
    return weights | {name: weights[names[p]] for name, p in every_name} if accelerator.is_main_process else {}


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


def _names(model):
    """The first name of each parameter."""
    return {parameter: name for name, parameter in model.named_parameters()}


def _buffers(model):
    """Persistent buffers by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
