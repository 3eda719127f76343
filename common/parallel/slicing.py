"""Tensor parallelism: the matrices of every layer cut over processes that work on the same rows.

As in Megatron, what comes first in a block is cut by its outputs, what ends it by its inputs; in between, a process
has some of the attention heads, or a part of the feed-forward layer, and one sum over the processes ends the block.
Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from typing import NamedTuple

import torch
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from common.errors import UserError
from common.models.presets import feed_forward_size
from common.parallel.processes import derive_seed

STYLES = {"col": ColwiseParallel, "row": RowwiseParallel}  # by outputs, by inputs


class Plan(NamedTuple):
    """How a layer is sliced; names are those of modules in it.

    matrices: "col" or "row" by name. attention: the first and the last matrix of the block in which processes have
    different heads, and must drop different attention weights. head_counts: attributes with the number of heads.
    """

    matrices: dict
    attention: tuple
    head_counts: tuple = ()


BERT = Plan(
    {
        "attention.self.query": "col",
        "attention.self.key": "col",
        "attention.self.value": "col",
        "attention.output.dense": "row",
        "intermediate.dense": "col",
        "output.dense": "row",
    },
    attention=("attention.self.query", "attention.output.dense"),
)
OPT = Plan(
    {
        "self_attn.q_proj": "col",
        "self_attn.k_proj": "col",
        "self_attn.v_proj": "col",
        "self_attn.out_proj": "row",
        "fc1": "col",
        "fc2": "row",
    },
    attention=("self_attn.q_proj", "self_attn.out_proj"),
    head_counts=("self_attn.num_heads",),
)
LLAMA = Plan(
    {
        "self_attn.q_proj": "col",
        "self_attn.k_proj": "col",
        "self_attn.v_proj": "col",
        "self_attn.o_proj": "row",
        "mlp.gate_proj": "col",
        "mlp.up_proj": "col",
        "mlp.down_proj": "row",
    },
    attention=("self_attn.q_proj", "self_attn.o_proj"),
)
PLANS = {"bert": BERT, "megatron-bert": BERT, "roberta": BERT, "opt": OPT, "llama": LLAMA}  # by model_type


def slice_layers(model, layers, mesh):
    """Leave to each process its slices of the layers' matrices, as DTensors; the rest stays whole everywhere.

    Args:
        model: transformers model, the same on every process; layers: its list of layers; mesh: of the processes that
            share them.
    Raises:
        UserError: a family without a plan, or a shape that cannot be cut.
    """
    check_slices(model.config, mesh.size())
    plan = PLANS[model.config.model_type]
    for number, layer in enumerate(layers):
        styles = {name: STYLES[style]() for name, style in plan.matrices.items()}
        parallelize_module(layer, mesh, styles, src_data_rank=None)
        _divide_heads(layer, plan, mesh.size())
        first, last = (layer.get_submodule(name) for name in plan.attention)
        _draw_apart(first, last, number, mesh.get_local_rank())


def narrow_layers(model, layers, slices):
    """Give a model without numbers the shapes of one process's slices.

    Args:
        model, layers: as slice_layers, of tensors without numbers; slices: of each layer.
    Raises:
        UserError: as slice_layers.
    """
    check_slices(model.config, slices)
    plan = PLANS[model.config.model_type]
    for layer in layers:
        for name, style in plan.matrices.items():
            whole = layer.get_submodule(name)
            outputs, inputs = whole.out_features, whole.in_features
            shape = (inputs, outputs // slices) if style == "col" else (inputs // slices, outputs)
            layer.set_submodule(name, torch.nn.Linear(*shape, bias=whole.bias is not None))
        _divide_heads(layer, plan, slices)


def transformer_layers(model):
    """The layers of a transformers model: those it says it calls (called_layers), or its longest list of modules.

    Raises:
        UserError: it has none.
    """
    if hasattr(model, "called_layers"):
        return list(dict.fromkeys(model.called_layers()))
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of layers to cut: choose accelerate_configs/ddp.yaml")
    return max(lists, key=len)


def check_slices(config, slices):
    """Refuse to slice a model that cannot be.

    Args:
        config: transformers configuration; slices: of each layer.
    Raises:
        UserError: a family without a plan, or a shape that cannot be cut.
    """
    if fault := slicing_fault(config, slices):
        raise UserError(fault)


def slicing_fault(config, slices):
    """Why a model cannot be sliced, in one line, or None. Args: as check_slices."""
    if slices == 1:
        return None
    if config.model_type not in PLANS:
        return (
            f"a {config.model_type} has no plan for tensor parallelism; known are {', '.join(PLANS)}: choose "
            "accelerate_configs/fsdp.yaml"
        )
    counts = {"attention heads": config.num_attention_heads, "feed-forward columns": feed_forward_size(config)}
    counts["key-value heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for name, count in counts.items():
        if count % slices:
            return (
                f"the model's {count} {name} cannot be cut in {slices} equal slices: choose a tensor parallel size "
                "that divides them"
            )
    return None


def _divide_heads(layer, plan, slices):
    for path in plan.head_counts:
        where, _, name = path.rpartition(".")
        module = layer.get_submodule(where)
        setattr(module, name, getattr(module, name) // slices)


def _draw_apart(first, last, number, rank):
    """Between two matrices, let dropout depend on the process; before and after, all processes draw the same.

    The state is put back as it was, so that what is dropped elsewhere is what a single process would drop.

    Args:
        first, last: modules; number: of their layer; rank: of this process among those that share it.
    """
    shared = []

    def enter(module, _):
        if module.training:
            shared[:] = [(generator, generator.get_state()) for generator in _generators(module.weight.device)]
            for generator, _ in shared:
                generator.manual_seed(derive_seed(generator.initial_seed(), number, rank))

    def leave(module, _):
        if module.training:
            for generator, state in shared:
                generator.set_state(state)

    first.register_forward_pre_hook(enter)
    last.register_forward_pre_hook(leave)


def _generators(device):
    """torch's own on this device, and the CPU's."""
    return [torch.default_generator] + ([torch.cuda.default_generators[device.index]] if device.type == "cuda" else [])
