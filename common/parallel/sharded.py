"""FSDP2 and HSDP: torch's fully_shard on the layers and on what is left, under accelerate's loop.

Not accelerate's own FSDP: on a CPU that falls back to plain data parallelism in silence; it cuts the input embedding
and the tied output apart; and it casts the outputs to bf16. Here a YAML means the same on CPUs and GPUs.
Sources: Zhao et al. 2023 (arXiv:2304.11277); torch.distributed.fsdp.fully_shard.
"""

import contextlib
import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from common.errors import UserError
from common.parallel.launch import check_optimizer
from common.parallel.plain import PlainAccelerator

PARALLELISM = "PARALLELISM_CONFIG_"
# What a YAML may say beside what is read below: by variable, the values that change nothing here.
IGNORED_VALUES = {
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "give --gradient_checkpointing, which works under every YAML"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "every layer is a unit"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "checkpoints hold whole tensors"),
}


class ShardedAccelerator(PlainAccelerator):
    """Parameters, gradients and optimizer state cut over the processes, or over groups of them that repeat each other.

    bf16 is autocast's over fp32 weights, as under every other strategy.

    Args:
        launch: common.parallel.launch.Launch; settings: of accelerate.Accelerator.
    Raises:
        UserError: something in the YAML that is not done here.
    """

    compiles = False

    def __init__(self, launch, **settings):
        self._offload = os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"
        self._reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError("the YAML's fsdp_version must be 2: FSDP1 is not supported")
        for name, (value, remedy) in IGNORED_VALUES.items():
            if os.environ.get(name, value) != value:
                key = name.lower()
                raise UserError(f"the YAML's {key} {os.environ[name]} is not supported: {remedy}; set it to {value}")
        if launch.precision == "fp16":
            raise UserError("fp16 is not supported under FSDP: take bf16, or a ZeRO YAML")
        sizes = _parallelism()
        self._replicas = sizes.get("dp_replicate", 1)
        shards = sizes.get("dp_shard", launch.world // self._replicas)
        if self._replicas * shards != launch.world:
            raise UserError(
                f"the YAML's dp_replicate_size {self._replicas} x dp_shard_size {shards} is not the number of "
                f"processes, {launch.world}: change num_processes or one of them"
            )
        for name in [name for name in os.environ if name.startswith(PARALLELISM)] + [
            "ACCELERATE_USE_FSDP",
            "ACCELERATE_USE_PARALLELISM_CONFIG",
        ]:
            os.environ.pop(name, None)  # what accelerate and transformers would act upon
        super().__init__(launch, **settings)
        sizes = (self._replicas, shards) if self._replicas > 1 else (shards,)
        names = ("replicate", "shard")[-len(sizes) :]
        self._mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)

    def describe_strategy(self):
        """Cut and copies, for people."""
        shards = self.num_processes // self._replicas
        name = f"HSDP, {self._replicas} copies cut in {shards}" if self._replicas > 1 else f"FSDP2, cut in {shards}"
        return name + (", parameters and optimizer on the CPU" if self._offload else "")

    def prepare(self, *objects, **options):
        """As accelerate's, for a model alone or with its optimizer, which has not stepped yet."""
        (model,) = (thing for thing in objects if isinstance(thing, torch.nn.Module))
        before = {parameter: name for name, parameter in model.named_parameters()}
        self._cut(model)
        after = dict(model.named_parameters())
        prepared = []
        for thing in objects:
            if thing is model:
                prepared.append(self.prepare_model(model, device_placement=False, evaluation_mode=True))
            else:
                check_optimizer("fsdp", thing)
                for group in thing.param_groups:
                    group["params"] = [after[before[parameter]] for parameter in group["params"]]
                prepared.append(self.prepare_optimizer(thing, device_placement=False))
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def _cut(self, model):
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self._offload else OffloadPolicy()
        for layer in transformer_layers(model):
            fully_shard(layer, mesh=self._mesh, reshard_after_forward=self._reshard, offload_policy=policy)
        fully_shard(model, mesh=self._mesh, offload_policy=policy)  # embeddings, norms and the tied head together

    @contextlib.contextmanager
    def no_sync(self, model):
        """Gradients stay where they are until the last micro-batch of a step."""
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def transformer_layers(model):
    """The layers of a transformers model: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of layers to cut: choose accelerate_configs/ddp.yaml")
    return max(lists, key=len)


def _parallelism():
    """The sizes that the YAML's parallelism_config gives, by name, where they are more than one."""
    found = {}
    for name, value in os.environ.items():
        if name.startswith(PARALLELISM) and name.endswith("_SIZE") and value.isdigit() and int(value) > 1:
            found[name.removeprefix(PARALLELISM).removesuffix("_SIZE").lower()] = int(value)
    if unknown := sorted(found.keys() - {"dp_replicate", "dp_shard"}):
        raise UserError(f"the YAML's parallelism_config {unknown[0]}_size is not supported: set it to 1")
    return found
