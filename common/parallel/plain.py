"""The accelerator where every process holds the whole model, and what those of other strategies must answer."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from common.models.whole import load_whole
from common.parallel import fp8, tensors


class PlainAccelerator(Accelerator):
    """accelerate's, for one process or data parallelism.

    Args:
        launch: common.parallel.launch.Launch; settings: of accelerate.Accelerator.
    Attributes:
        states: the module that turns what this strategy holds into whole tensors and back; see common.parallel.state.
        compiles: whether the model may be compiled as a whole before prepare(); make_accelerator says so.
        steps_behind: how many steps the loss and the norm that a step returns are older than it.
    """

    states = tensors
    steps_behind = 0

    def __init__(self, launch, **settings):
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
        if launch.precision == "fp8":
            handlers.append(fp8.recipe())
        super().__init__(cpu=launch.cpu, mixed_precision=launch.precision, kwargs_handlers=handlers, **settings)

    def prepare(self, *objects, **options):
        """As accelerate's; says which layers are in fp8 where that is asked for."""
        prepared = super().prepare(*objects, **options)
        if self.mixed_precision == "fp8":
            for model in filter(lambda thing: isinstance(thing, torch.nn.Module), objects):
                self.print(fp8.describe_layers(model), flush=True)
        return prepared

    def prepare_optimizer(self, optimizer, device_placement=None):
        """As accelerate's; an overflow in fp16 is left to the loss scale, which says when it skips an update."""
        optimizer._step_supports_amp_scaling = False  # a fused optimizer skips in silence
        return super().prepare_optimizer(optimizer, device_placement)

    @property
    def data_rank(self):
        """(rank, ranks) among the processes that read different rows."""
        return self.process_index, self.num_processes

    @property
    def checkpoint_part(self):
        """(number of the part of a checkpoint that this process writes, or None; number of parts)."""
        return (0 if self.is_main_process else None), 1

    def place_of(self, rank):
        """Where a process is in the arrangement of this strategy, for people, with a space before; or nothing."""
        return ""

    def record_passes(self):
        """Begin to note when this process computes, where others may wait for it."""

    def passes(self, about):
        """What was noted: as common.parallel.stage_times.StageTimes.gather; None where nothing is."""

    def load_pretrained(self, auto_class, name, **options):
        """As auto_class.from_pretrained with output_loading_info; prepare() may be what reads the numbers.

        Args:
            auto_class: of transformers; name: folder or hub name; options: of from_pretrained.
        Returns:
            (model, info).
        """
        return load_whole(auto_class, name, **options)

    def build(self, make):
        """A model with random weights; prepare() may be what draws the numbers, which are the same.

        Args:
            make: function without arguments that returns the model.
        Returns:
            the model.
        """
        return make()

    def describe_strategy(self):
        """What is in force, for people."""
        return "single process" if self.num_processes == 1 else "data parallel (DDP)"

    def loss_scale_state(self, optimizer):
        """fp16's loss scale, and what it takes to go on with it: dict of numbers, empty in other precisions."""
        return self.scaler.state_dict() if self.scaler else {}

    def set_loss_scale_state(self, optimizer, saved):
        """Take over what loss_scale_state returned, under this strategy or another, which leaves its `scale` alone."""
        self.scaler.load_state_dict({key: saved.get(key, value) for key, value in self.scaler.state_dict().items()})

    def limit_memory(self, cap_gb):
        """As common.parallel.limit_memory: no part of this strategy asks how much memory there is."""

    def follow_command_line(self, per_device, accumulation, max_grad_norm):
        """As common.parallel.set_batch."""
        self.set_accumulation(accumulation)

    def set_accumulation(self, accumulation):
        """As common.parallel.set_accumulation."""
        self.gradient_accumulation_steps, self.step = accumulation, 0  # it counts from here on
