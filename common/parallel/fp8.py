"""fp8 by torchao, through accelerate: what it needs, what accelerate is told, and what became of a model.

Forward and backward products of most linear layers run in 8 bits, with one scale for a tensor, found anew each time;
the weights stay fp32 and everything else is bf16 autocast's. The first linear layer and the last, which is the head,
are left to bf16. Sources: Micikevicius et al. 2022 (arXiv:2209.05433); accelerate.utils.ao; torchao.float8.
"""

import importlib.metadata
import os

import torch
from accelerate.utils import AORecipeKwargs

from common.errors import UserError

TORCHAO = "0.18.0"
LEAST_CAPABILITY = (8, 9)  # Ada Lovelace and Hopper
INSTEAD = "or take bf16 with another YAML (accelerate launch --mixed_precision bf16)"
NAMED = 4  # layers that a line names


def check_fp8(engine, cpu):
    """Refuse fp8 where it cannot be had; accelerate would take fp16 on an older card, and say so in passing.

    Args:
        engine: as common.parallel.launch.launched_engine; cpu: whether to compute there.
    Raises:
        UserError: the strategy, device, backend or torchao's version is another than fp8 works with.
    """
    if engine != "plain":
        raise UserError(
            f"fp8 is for one process or data parallelism, not for {engine}: choose accelerate_configs/fp8.yaml, "
            f"{INSTEAD}"
        )
    if cpu:
        raise UserError(f"fp8 needs a GPU, of compute capability 8.9 or more: use one, {INSTEAD}")
    backend = os.environ.get("ACCELERATE_FP8_BACKEND") or "AO"
    if backend.upper() != "AO":
        raise UserError(f"the YAML's fp8_config backend {backend} is not supported: set it to AO, which is torchao")
    try:
        found = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != TORCHAO:
        there = f"{found} is installed" if found else "which is not installed"
        raise UserError(f"fp8 needs torchao {TORCHAO}, {there}: pip install torchao=={TORCHAO}")
    device = int(os.environ.get("LOCAL_RANK", 0))
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name, number = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise UserError(
            f"fp8 needs compute capability 8.9 or more (Ada, Hopper), {name} has {number}: use another card, {INSTEAD}"
        )


def recipe():
    """What accelerate's `kwargs_handlers` take: accelerate's own recipe, without what is for FSDP.

    That, its default, would put other parameters in the place of those that the optimizer has been given.
    """
    return AORecipeKwargs(enable_fsdp_float8_all_gather=False)


def describe_layers(model):
    """What accelerate has made of a model.

    Args:
        model: torch.nn.Module that was prepared.
    Returns:
        str: how many linear layers are in fp8, and which are not.
    Raises:
        UserError: none of them is.
    """
    from torchao.float8.float8_linear import Float8Linear

    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    rest = [name for name, module in linear.items() if not isinstance(module, Float8Linear)]
    if len(rest) == len(linear):
        raise UserError(
            f"fp8 finds no layer in {type(model).__name__}: it takes torch's linear layers, the first and the last "
            f"apart, with widths that are multiples of 16: change the model, {INSTEAD}"
        )
    more = f" and {len(rest) - NAMED} more" if len(rest) > NAMED else ""
    return f"fp8: {len(linear) - len(rest)} of {len(linear)} linear layers; bf16: {', '.join(rest[:NAMED])}{more}"
