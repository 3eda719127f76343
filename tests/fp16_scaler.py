"""An entry script with fp16's loss scale on a CPU, where fp16 itself does not run, and gradients that overflow.

python tests/fp16_scaler.py <first scale> <largest scale without overflow> <script> its flags...
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parallel
from common.errors import run_main


class Scaler(torch.amp.GradScaler):
    """torch's, on a CPU; a scale above `largest` makes every gradient infinite, as it would in fp16."""

    def __init__(self, first, largest):
        super().__init__("cpu", init_scale=first, growth_interval=10_000)
        self.largest = largest

    def scale(self, outputs):
        scaled = super().scale(outputs)
        return scaled if self.get_scale() <= self.largest else scaled * float("inf")


def with_scaler(make_accelerator, first, largest):
    """make_accelerator, whose accelerator scales the loss in fp32 as it would in fp16."""

    def make(*args, **options):
        accelerator = make_accelerator(*args, **options)
        accelerator.scaler = Scaler(first, largest)
        # accelerate's own does the same, in fp16 alone
        accelerator.unscale_gradients = lambda: [
            accelerator.scaler.unscale_(optimizer.optimizer) for optimizer in accelerator._optimizers
        ]
        return accelerator

    return make


if __name__ == "__main__":
    first, largest = (float(sys.argv.pop(1)) for _ in range(2))
    script = importlib.import_module(sys.argv.pop(1).removesuffix(".py"))
    parallel.make_accelerator = with_scaler(parallel.make_accelerator, first, largest)
    run_main(script.main)
