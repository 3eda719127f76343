"""FSDP2, HSDP and tensor parallelism, alone and together, under accelerate's loop.

torch's fully_shard on the layers and on what is left; where layers are sliced, that comes first. Not accelerate's own
FSDP: on a CPU that falls back to plain data parallelism in silence; it cuts the input embedding and the tied output
apart; and it casts the outputs to bf16. Here a YAML means the same on CPUs and GPUs.
Weights in files are read in parts where they can be: see parts.py.
Sources: Zhao et al. 2023 (arXiv:2304.11277); torch.distributed.fsdp.fully_shard.
"""

import contextlib
import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from common.errors import UserError
from common.parallel.launch import PARALLELISM, check_optimizer
from common.parallel.parts import fill, load_parts
from common.parallel.plain import PlainAccelerator
from common.parallel.slicing import slice_layers, transformer_layers
from common.parallel.tensors import follow, groups_of_one_mesh

# What a YAML may say beside what is read below: by variable, the values that change nothing here.
IGNORED_VALUES = {
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "give --gradient_checkpointing, which works under every YAML"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "every layer is a unit"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "checkpoints hold whole tensors"),
}


class ShardedAccelerator(PlainAccelerator):
    """Parameters, gradients and optimizer state cut over the processes, as launch.Sizes arranges them.

    bf16 is autocast's over fp32 weights, as under every other strategy.

    Args:
        launch: common.parallel.launch.Launch; settings: of accelerate.Accelerator.
    Raises:
        UserError: something in the YAML that is not done here.
    """

    def __init__(self, launch, **settings):
        self._engine, self._sizes = launch.engine, launch.sizes
        self._offload, self._reshard = _fsdp_options() if launch.engine == "fsdp" else (False, True)
        for name in [name for name in os.environ if name.startswith(PARALLELISM)] + [
            "ACCELERATE_USE_FSDP",
            "ACCELERATE_USE_PARALLELISM_CONFIG",
        ]:
            os.environ.pop(name, None)  # what accelerate and transformers would act upon
        super().__init__(launch, **settings)
        self._mesh = init_device_mesh(self.device.type, self._sizes, mesh_dim_names=self._sizes._fields)

    @property
    def data_rank(self):
        """As PlainAccelerator's: slices of the same layers lie next to each other."""
        slices = self._sizes.slices
        return self.process_index // slices, self.num_processes // slices

    def load_pretrained(self, auto_class, name, **options):
        """As PlainAccelerator's; each process reads its part alone, in prepare(), where the files let it."""
        return load_parts(self, auto_class, name, **options)

    def describe_strategy(self):
        """Slices, cut and copies, for people."""
        copies, shards, slices = self._sizes
        parts = [f"tensor parallel, layers in {slices} slices"] if slices > 1 else []
        if self._engine == "fsdp":
            parts.append(f"HSDP, {copies} copies cut in {shards}" if copies > 1 else f"FSDP2, cut in {shards}")
        elif copies > 1:
            parts.append(f"{copies} copies")
        return ", ".join(parts) + (", parameters and optimizer on the CPU" if self._offload else "")

    def prepare(self, *objects, **options):
        """As accelerate's, for a model alone or with its optimizer, which has not stepped yet."""
        (model,) = (thing for thing in objects if isinstance(thing, torch.nn.Module))
        before = {parameter: name for name, parameter in model.named_parameters()}
        self._cut(model)
        prepared = []
        for thing in objects:
            if thing is model:
                prepared.append(self.prepare_model(model, device_placement=False, evaluation_mode=True))
            else:
                check_optimizer(self._engine, thing)
                follow(thing, before, model)
                thing.param_groups[:] = groups_of_one_mesh(thing.param_groups)
                prepared.append(self.prepare_optimizer(thing, device_placement=False))
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def _cut(self, model):
        copies, shards, slices = self._sizes
        layers = transformer_layers(model)
        if slices > 1:
            slice_layers(model, layers, self._mesh["slices"])
        slices_alone = slices > 1 and copies * shards == 1
        if not slices_alone:  # of one process, too, whose parameters may be offloaded
            self._shard(model, layers)
        if hasattr(model, "places"):
            fill(model, torch.device("cpu") if self._offload else self.device)
        if slices_alone and self.device.type != "cpu":  # there it is already, and torch would copy it
            model.to(self.device)

    def _shard(self, model, layers):
        copies = self._sizes.copies
        mesh = self._mesh["copies", "shards"] if copies > 1 else self._mesh["shards"]
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self._offload else OffloadPolicy()
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=self._reshard, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)  # embeddings, norms and the tied head together

    @contextlib.contextmanager
    def no_sync(self, model):
        """Gradients stay where they are until the last micro-batch of a step."""
        if not isinstance(model, FSDPModule):  # layers in slices and nothing else: all compute the same
            yield
            return
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def _fsdp_options():
    """(whether to offload, whether to cut a layer again after its forward pass), as the YAML's fsdp_config says."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("the YAML's fsdp_version must be 2: FSDP1 is not supported")
    for name, (value, remedy) in IGNORED_VALUES.items():
        if os.environ.get(name, value) != value:
            key = name.lower()
            raise UserError(f"the YAML's {key} {os.environ[name]} is not supported: {remedy}; set it to {value}")
    offload = os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"
    return offload, os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
