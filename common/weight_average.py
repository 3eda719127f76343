"""An exponential moving average of a run's weights, in the parts that each process holds."""

import contextlib

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.parallel.state import held_weights, load_weights, save_weights

FILE = "average.safetensors"  # in a checkpoint


class WeightAverage:
    """decay * average + (1 - decay) * weights after every step; after the first one it is a copy.

    Args:
        accelerator: whose strategy may cut the weights, and holds each in one place; model: as it prepared it.
        decay: in (0, 1).
    Source: Polyak and Juditsky 1992; torch.optim.swa_utils.
    """

    def __init__(self, accelerator, model, decay):
        self.accelerator, self.model, self._follow = accelerator, model, get_ema_multi_avg_fn(decay)
        self.parts = [weight.clone() for weight in held_weights(accelerator, model)]

    @torch.no_grad()
    def update(self, step):
        """Take in the weights after an optimizer step. Args: step: its number, from 1 on."""
        held = held_weights(self.accelerator, self.model)
        if step == 1:
            torch._foreach_copy_(self.parts, held)
        else:
            self._follow(self.parts, held, None)

    @contextlib.contextmanager
    def in_place(self):
        """Context in which the model has the average's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for weight, part in zip(held_weights(self.accelerator, self.model), self.parts, strict=True):
            kept = weight.clone()
            weight.copy_(part)
            part.copy_(kept)

    def save(self, folder):
        """Write it whole into a checkpoint's folder. Every process calls it."""
        with self.in_place():
            save_weights(self.accelerator, self.model, folder / FILE)

    def load(self, folder):
        """Read back what save wrote. The model has these weights afterwards, too. Every process calls it."""
        load_weights(self.accelerator, self.model, folder / FILE)
        torch._foreach_copy_(self.parts, held_weights(self.accelerator, self.model))
