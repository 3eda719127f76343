"""The accelerator where every process holds the whole model, and what those of other strategies must answer."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from common.errors import UserError
from common.parallel import tensors


class PlainAccelerator(Accelerator):
    """accelerate's, for one process or data parallelism.

    Args:
        launch: common.parallel.launch.Launch; settings: of accelerate.Accelerator.
    Attributes:
        states: the module that turns what this strategy holds into whole tensors and back; see common.parallel.state.
        cuts_tensors: whether the optimizer sees parts of tensors.
        compiles: whether the model may be compiled as a whole before prepare().
    """

    states = tensors
    cuts_tensors = False
    compiles = True

    def __init__(self, launch, **settings):
        super().__init__(
            cpu=launch.cpu,
            mixed_precision=launch.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
            **settings,
        )

    def describe_strategy(self):
        """What is in force, for people."""
        return "single process" if self.num_processes == 1 else "data parallel (DDP)"

    def follow_command_line(self, per_device, accumulation, max_grad_norm):
        """As common.parallel.set_batch."""
        self.gradient_accumulation_steps = accumulation

    def refuse_optimizers(self, objects, takes):
        """Raise UserError where an optimizer among the objects cannot work under this strategy.

        Args:
            objects: what prepare() was given; takes: function of an optimizer, whether it can.
        """
        for optimizer in objects:
            if isinstance(optimizer, torch.optim.Optimizer) and not takes(optimizer):
                raise UserError(
                    f"{type(optimizer).__name__} looks at whole tensors, and {self.describe_strategy()} gives it "
                    "parts of them: give --optimizer_type adamw, or choose accelerate_configs/ddp.yaml"
                )
