"""Weights and optimizer state of a run in training, on disk and back, and the final weights as one dict."""

from pickle import UnpicklingError

import torch
from safetensors.torch import load_model, save_model
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"


def plain_model(model):
    """The transformers model inside what accelerator.prepare returned.

    accelerate's own unwrap_model imports DeepSpeed where it is installed, which takes seconds.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def save_training_state(accelerator, model, optimizer, folder):
    """Write weights and optimizer state. Every process calls it.

    Where every process holds everything, the main process writes it once under the names of the plain model, so that
    any number of processes can continue from it.

    Args:
        model, optimizer: as accelerator.prepare returned them.
        folder: Path that exists.
    """
    if accelerator.is_main_process:
        save_model(plain_model(model), str(folder / WEIGHTS))  # knows tied tensors
        plain_model(model).config.save_pretrained(folder)  # so that from_pretrained can load it, too
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}  # fp16's loss scale
        torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler}, folder / OPTIMIZER)


def load_training_state(accelerator, model, optimizer, folder):
    """Read back what save_training_state wrote, into the same objects. Nothing but tensors and numbers is unpickled.

    Raises:
        UserError: the optimizer keeps something else in its state.
    """
    load_model(plain_model(model), folder / WEIGHTS)
    try:
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{folder / OPTIMIZER}: this optimizer keeps more than tensors and numbers in its state, which is not "
            "unpickled; let its state_dict hold plain values"
        ) from error
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])


def consolidated_weights(accelerator, model):
    """The whole model's weights on the main process. Every process calls it.

    Returns:
        dict of names of the plain model to tensors, as save_pretrained(state_dict=...) takes it.
    """
    return plain_model(model).state_dict() if accelerator.is_main_process else {}


def bytes_per_rank(model, optimizer):
    """(parameter bytes, optimizer state bytes) that this process holds."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    states = optimizer.state_dict()["state"].values()
    tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
    return parameters, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
