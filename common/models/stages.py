"""Stages of a pipeline: consecutive layers of a stock model, under the names that the whole model gives them.

A process builds the whole model and drops what its stages do not use. What several stages use, as a tied embedding,
each of them keeps.
"""

import itertools
from typing import NamedTuple

import torch

from common.errors import UserError

ENCODER = "encoder.layer"


class Ends(NamedTuple):
    """Modules of the body that belong to the first and to the last stage, by their names in it; the layers' name.

    What is neither there nor a layer is used by every stage.
    """

    first: tuple = ("embeddings",)
    last: tuple = ("pooler",)
    layers: str = ENCODER


ENDS = {  # by model_type; heads, outside of the body, are the last stage's
    "bert": Ends(),
    "megatron-bert": Ends(last=("encoder.ln", "pooler")),
    "roberta": Ends(),
    "albert": Ends(("embeddings", "encoder.embedding_hidden_mapping_in"), layers="encoder.albert_layer_groups"),
    "deberta": Ends(),
    "deberta-v2": Ends(("embeddings", "encoder.conv")),
    "modernbert": Ends(last=("final_norm",), layers="layers"),
    "opt": Ends(
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
        ("decoder.final_layer_norm", "decoder.project_out"),
        "decoder.layers",
    ),
}


def divide_layers(layers, stages):
    """Consecutive ranges of layers, as equal as they can be; the later ones are the larger.

    Args:
        layers, stages: numbers of them.
    Returns:
        list of ranges, one for each stage.
    """
    ends = [number * layers // stages for number in range(stages + 1)]
    return [range(*pair) for pair in itertools.pairwise(ends)]


def check_stages(model, pipe):
    """Refuse to cut a model that cannot be.

    Args:
        model: of transformers; pipe: common.parallel.launch.Pipe.
    Raises:
        UserError: a family without a plan, fewer layers than stages, or than modules of a file's stages, or a model
            whose forward pass is not known by parts, as it is another than those of common/models.
    """
    if pipe.stages == 1:
        return
    config = model.config
    check_family(config)
    if not all(pipe.layers(config.num_hidden_layers)):
        raise UserError(
            f"the model's {config.num_hidden_layers} layers are not enough for {pipe.stages} stages: lower the number "
            "of stages in the YAML's role"
        )
    if getattr(config, "layerdrop", 0):
        raise UserError(
            f"layerdrop {config.layerdrop} leaves out layers at random, which no pipeline does: set it to 0"
        )
    if not hasattr(model, "run_part"):
        raise UserError(
            f"the passes of a {type(model).__name__} are not known stage by stage: choose accelerate_configs/ddp.yaml"
        )


def check_family(config):
    """Refuse a family of which it is not known how to cut it. Args: config: of transformers. Raises: UserError."""
    if config.model_type not in ENDS:
        raise UserError(
            f"{config.model_type} has no plan for a pipeline; known are {', '.join(ENDS)}: choose "
            "accelerate_configs/fsdp.yaml"
        )


def used_parameters(model, layers):
    """The parameters that a stage uses.

    Args:
        model: whole model with called_layers(); layers: range of the numbers of the stage's.
    Returns:
        set of torch.nn.Parameter.
    """
    called, body = model.called_layers(), model.base_model
    ends = ENDS[model.config.model_type]
    of_ends = {"first": _parameters(body, ends.first), "last": _parameters(body, ends.last)}
    in_body = set(body.parameters())
    of_ends["last"] |= {parameter for parameter in model.parameters() if parameter not in in_body}
    if model.get_output_embeddings() is not None:  # a classifier has none
        of_ends["last"] |= set(model.get_output_embeddings().parameters())
    apart = of_ends["first"] | of_ends["last"] | set(body.get_submodule(ends.layers).parameters())
    used = {parameter for parameter in in_body if parameter not in apart}
    used |= {parameter for number in layers for parameter in called[number].parameters()}
    if layers.start == 0:
        used |= of_ends["first"]
    if layers.stop == len(called):
        used |= of_ends["last"]
    return used


def drop_unused(model, used):
    """Leave a model without the parameters that are not used here; its modules stay, so that nothing changes names.

    Args:
        model: torch.nn.Module; used: set of its parameters. Buffers stay.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in used:
                module._parameters[name] = None


def _parameters(body, names):
    modules = [body.get_submodule(name) for name in names if _has(body, name)]
    return {parameter for module in modules for parameter in module.parameters()}


def _has(module, path):
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, torch.nn.Module)
