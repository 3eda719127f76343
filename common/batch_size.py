"""The cut of the global batch into micro-batches, and what to do when a device is full."""

import torch
from accelerate.utils.memory import clear_device_cache

from common.errors import DEVICE_FULL, UserError, is_out_of_memory
from common.memory_settings import give_back_memory


def cut_global_batch(train_batch_size, per_device, ranks):
    """(rows per device, accumulation) for a global batch.

    Args:
        train_batch_size: rows in the global batch; per_device: most rows a device takes at once; ranks: processes.
    Raises:
        UserError: a global batch that cannot be cut evenly.
    """
    if train_batch_size % ranks:
        raise UserError(
            f"--train_batch_size {train_batch_size} is not divisible by the {ranks} processes: give a multiple"
        )
    per_device = min(per_device, train_batch_size // ranks)
    if train_batch_size % (per_device * ranks):
        raise UserError(
            f"--train_batch_size {train_batch_size} is not divisible by --per_device_train_batch_size {per_device} x "
            f"{ranks} processes: change one of them"
        )
    return per_device, train_batch_size // (per_device * ranks)


def find_batch_size(accelerator, model, try_batch, per_device, agree_max):
    """Halve the rows per device until forward, backward and optimizer state fit, on every process.

    Args:
        model: prepared, in training mode; its gradients are dropped.
        try_batch: function of a number of rows giving a batch on the device.
        per_device: rows to begin with.
        agree_max: function that takes the element-wise maximum over processes.
    Returns:
        int: rows per device, a divisor of what was given.
    Raises:
        UserError: the smallest possible number does not fit.
    """
    while True:
        fits = _fits(accelerator, model, try_batch, per_device)
        model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        give_back_memory()
        if not agree_max([float(not fits)])[0]:
            return per_device
        if per_device % 2:
            raise UserError(f"--per_device_train_batch_size {per_device} does not fit: {DEVICE_FULL}")
        per_device //= 2


def _fits(accelerator, model, try_batch, per_device):
    try:
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # AdamW's come only with a step
        for _ in range(2):  # the second pass finds the gradients of the first, as with accumulation
            with accelerator.no_sync(model):
                accelerator.backward(model(**try_batch(per_device)).loss)
        return bool(moments)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
