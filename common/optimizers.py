"""Optimizers by name: of the registry below, of torch.optim, of pytorch_optimizer, or a class of a file or module."""

import ast
import difflib
import inspect
from collections import defaultdict
from functools import partial

import torch

from common.errors import UserError
from common.hardware import AUTOCAST
from common.optim.lamb import Lamb
from common.optim.library import (
    is_of_library,
    is_schedule_free,
    library_classes,
    splits_matrices,
    unfit,
    why_not_train,
)
from common.optim.muon import Muon
from common.optim.sophia import Sophia
from common.plugins import is_plugin, load_plugin

OPTIMIZERS = {  # to add one: a name, and a class whose constructor takes (params, lr, ...)
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "lamb": Lamb,
    "muon": Muon,  # for the matrices of the layers, AdamW for the rest
    "sophia": Sophia,  # whose curvature common/curvature.py estimates
}
# Constructor arguments that have a flag of their own and therefore are not for --optimizer_args.
FLAGS = {
    "lr": "--learning_rate",
    "weight_decay": "--weight_decay",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
}
OF_ADAM = ("betas", "eps")
ESTIMATED = "fp32", "no", "bf16"  # precisions in which no scale is on the gradients


def build_optimizer(
    model: torch.nn.Module, args, precision: str = "fp32", trial: bool = True
) -> torch.optim.Optimizer:
    """Make the optimizer that the arguments name, over the parameters of the model that are trained.

    Of the four settings that have flags, each goes only to a class that takes it. Not taking adam_beta1/2 and
    adam_epsilon is normal for what is not an Adam, and classes of pytorch_optimizer and Sophia keep their own unless
    optimizer_args says otherwise; not taking a weight decay that is set is an error.

    Args:
        model: the parameters may be on any device; they may still be moved before the first step.
        args: optimizer_type, optimizer_args (list of "key=value"), learning_rate, weight_decay, adam_beta1,
            adam_beta2, adam_epsilon, lr_scheduler_type.
        precision: of the run's matrix products, "fp32" (or "no"), "bf16", "fp16" or "fp8"; one of ours may have some
            itself.
        trial: whether a class of the library is tried out, and one that wants curvature may lack it here.
    Raises:
        UserError: unknown name, a class that cannot be imported or trained with, or arguments that it does not take.
    """
    optimizer_class = find_optimizer_class(args.optimizer_type)
    if reason := unfit(optimizer_class):
        raise UserError(f"--optimizer_type {args.optimizer_type}: {optimizer_class.__name__} {reason}")
    if is_schedule_free(optimizer_class) and args.lr_scheduler_type != "constant":
        raise UserError(
            f"--lr_scheduler_type {args.lr_scheduler_type}: {optimizer_class.__name__} averages the weights in place "
            "of lowering the rate: give --lr_scheduler_type constant (after the warm-up)"
        )
    if trial and estimates_curvature(optimizer_class) and (reason := _why_no_estimate(model, precision)):
        raise UserError(f"--optimizer_type {args.optimizer_type}: {optimizer_class.__name__} {reason}")
    accepted = _accepted_arguments(optimizer_class)
    of_flags = accepted & FLAGS.keys() - _left_to_class(optimizer_class)
    betas = (args.adam_beta1, args.adam_beta2)
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "betas": betas, "eps": args.adam_epsilon}
    for name in ("lr", "weight_decay"):
        if settings[name] and name not in accepted:
            raise UserError(
                f"--optimizer_type {args.optimizer_type}: {optimizer_class.__name__} takes no argument {name}, so "
                f"{FLAGS[name]} {settings[name]} would be ignored; "
                + ("give --weight_decay 0" if name == "weight_decay" else "choose one that does")
            )
    arguments = {name: value for name, value in settings.items() if name in of_flags}
    if args.optimizer_type in OPTIMIZERS and "fused" in accepted and _can_be_fused(model):
        arguments["fused"] = True
    if args.optimizer_type in OPTIMIZERS and "bf16" in accepted:
        arguments["bf16"] = AUTOCAST.get(precision) is torch.bfloat16
    arguments |= parse_optimizer_args(args.optimizer_args, accepted, of_flags, optimizer_class.__name__)
    make, groups = partial(optimizer_class, **arguments), partial(_groups_for, optimizer_class, args.weight_decay)
    try:
        optimizer = make(groups(model))
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise UserError(
            f"--optimizer_type {args.optimizer_type}: {optimizer_class.__name__} does not take these arguments "
            f"({given}): {_one_line(error)}; change the flag or --optimizer_args they come from"
        ) from error
    if trial and is_of_library(optimizer_class) and (reason := why_not_train(make, groups)):
        raise UserError(f"--optimizer_type {args.optimizer_type}: {optimizer_class.__name__} {reason}")
    return optimizer


def estimates_curvature(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer, or a class of them, wants gradients at drawn labels, too; see common/curvature.py."""
    return hasattr(optimizer, "update_curvature")


def _why_no_estimate(model, precision):
    if not getattr(model, "draws_labels", False):
        return (
            "draws labels from one softmax over the vocabulary, of masked or of next tokens, and this loss has "
            "others: give --optimizer_type adamw, or drop --sentence_objective where there is one"
        )
    if precision not in ESTIMATED:
        return f"squares gradients, which {precision} scales: give --bf16 or --fp32"
    return None


def parameter_groups(model: torch.nn.Module, weight_decay: float, matrices_apart: bool = False) -> list[dict]:
    """Split the trained parameters into those with weight decay and those without: biases, and all that norms hold.

    A norm is known by its class name and a bias by its own, not by having one dimension, because a parameter that is
    already split over ranks may have any shape. A parameter that is used twice is listed once.

    Args:
        model: any module.
        weight_decay: for the first group; the second gets 0.
        matrices_apart: take the hidden matrices out of the first group into a third, with decay and `matrices` True.
    Returns:
        groups as torch.optim takes them, at most two or three, none of them empty.
    """
    decayed, others, seen = [], [], set()
    hidden = hidden_matrices(model) if matrices_apart else set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            (others if is_norm or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": [p for p in decayed if p not in hidden], "weight_decay": weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}]
    groups += [{"params": [p for p in decayed if p in hidden], "weight_decay": weight_decay, "matrices": True}]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The weights of linear layers between the embedding and the output, neither of which they share."""
    outside = {p for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside |= set(output.parameters()) if output is not None else set()
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return {layer.weight for layer in linear if layer.weight not in outside}


@torch.no_grad()
def why_not_in_parts(optimizer: torch.optim.Optimizer, in_turn: bool = False, steps: int = 120) -> str | None:
    """Why an optimizer would compute something else where it is given any part of a tensor: tried out.

    One twin updates two matrices of different size, another their numbers in a row, a third half of the row, by the
    same gradients. What looks at whole tensors (LAMB, LARS, Muon, Adafactor, Shampoo) or at all of them (Prodigy)
    tells the difference, or fails on the row.

    Args:
        optimizer: as build_optimizer returned it; left as it is.
        in_turn: whether step() is called for other parameters in between, the group being empty.
        steps: updates; some classes begin to look only after a hundred.
    Returns:
        what it does, for a message; None where it treats every number by itself.
    """
    if hasattr(optimizer, "eval") and in_turn:
        return "judges other weights than it trains, of which there are copies"
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, slopes = [random(4, 6), 10 * random(3, 5)], [random(4, 6), 10 * random(3, 5)]
    row = [torch.cat([matrix.flatten() for matrix in whole])]
    half = len(row[0]) // 2
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    settings += [{**setting, "lr": 1.0} for setting in settings if "lr" in setting]  # large steps show more
    reason = "looks at whole tensors and would be given parts of them"
    try:
        for setting in settings:
            starts = (whole, row, [row[0][:half]])
            matrices, (line,), (part,) = ([t.clone().requires_grad_() for t in tensors] for tensors in starts)
            twins = [_twin(optimizer, [{**setting, "params": tensors}]) for tensors in (matrices, [line], [part])]
            for _ in range(steps):
                for matrix, slope in zip(matrices, slopes, strict=True):
                    matrix.grad = slope + random(matrix.shape)  # what finds its own rate has to find one
                line.grad = torch.cat([matrix.grad.flatten() for matrix in matrices])
                part.grad = line.grad[:half].clone()
                for twin in twins:
                    twin.step()
            flat = torch.cat([matrix.flatten() for matrix in matrices])
            if not (_near(flat, line, row[0]) and _near(part, line[:half], row[0][:half])):
                return reason
            if any(isinstance(value, list | tuple | dict) for value in twins[1].state[line].values()):
                return "keeps lists in its state, which cannot be cut"
            if in_turn and not _counts_by_parameter(optimizer, setting, line, steps):
                return "counts the steps of all parameters at once, which are updated in turn"
    except Exception:  # not proven, whatever a library's or a user's class has raised
        return reason
    return None


@torch.no_grad()
def why_not_apart(optimizer: torch.optim.Optimizer, steps: int = 120) -> str | None:
    """Why an optimizer would compute something else where it is given some of a model's tensors: tried out.

    One twin updates two matrices, another one of them by the same gradients.

    Args:
        optimizer: as build_optimizer returned it; left as it is. steps: updates, as in why_not_in_parts.
    Returns:
        what it does, for a message; None where it treats every tensor by itself.
    """
    if hasattr(optimizer, "eval"):
        return "judges other weights than it trains, which no stage of a pipeline can tell apart"
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, slope = random(4, 6), random(4, 6)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    settings += [{**setting, "lr": 1.0} for setting in settings if "lr" in setting]  # large steps show more
    reason = "looks at all tensors at once, and a stage of a pipeline has some of them"
    try:
        for setting in settings:
            alone, beside, other = (start.clone().requires_grad_() for _ in range(3))
            twins = [_twin(optimizer, [{**setting, "params": tensors}]) for tensors in ([alone], [beside, other])]
            for _ in range(steps):
                alone.grad = slope + random(4, 6)
                beside.grad, other.grad = alone.grad.clone(), 100 * random(4, 6)
                for twin in twins:
                    twin.step()
            if not _near(alone, beside, start):
                return reason
    except Exception:  # as there
        return reason
    return None


def _counts_by_parameter(optimizer, setting, start, steps):
    """Whether calls of step() with an empty group in between change nothing."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=start.dtype)
    left, right = (start.detach().clone().requires_grad_() for _ in range(2))
    twins = [_twin(optimizer, [{**setting, "params": [tensor]}]) for tensor in (left, right)]
    for _ in range(steps):
        left.grad = random(start.shape)
        right.grad = left.grad.clone()  # some work in it
        for twin in twins:
            twin.step()
        twins[1].param_groups[0]["params"] = []
        twins[1].step()
        twins[1].param_groups[0]["params"] = [right]
    return _near(left, right, start)


def _near(left, right, start):
    """Whether two have gone the same way from where they started, whatever the learning rate."""
    return (left - right).abs().max() <= 1e-4 * (right - start).abs().max()


def _twin(optimizer, groups):
    """An optimizer with the same settings and nothing done yet; its constructor may want what nobody remembers."""
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer), param_groups=groups, state=defaultdict(dict))
    return twin


def find_optimizer_class(optimizer_type: str) -> type[torch.optim.Optimizer]:
    """Look up a name in the registry, in torch.optim, in pytorch_optimizer, or load file.py:Class or module:Class.

    Raises:
        UserError: no such name, module or class, or something that is not a torch optimizer or not stepped like one.
    """
    if optimizer_type in OPTIMIZERS:
        return OPTIMIZERS[optimizer_type]
    flag = f"--optimizer_type {optimizer_type}"
    if name := _torch_names().get(optimizer_type.lower()):
        return getattr(torch.optim, name)
    if not is_plugin(optimizer_type):
        others = library_classes()
        spelled = optimizer_type.lower().replace("-", "").replace("_", "")
        if spelled in others:
            return others[spelled]
        near = difflib.get_close_matches(spelled, dict.fromkeys([*OPTIMIZERS, *_torch_names(), *others]), n=3)
        hint = f"did you mean {', '.join(near)}? or " if near else ""
        raise UserError(
            f"{flag}: no such optimizer; {hint}choose "
            f"{', '.join(OPTIMIZERS)}, another of torch.optim or of pytorch_optimizer, or give a class of your own as "
            "path/to/file.py:Class or module:Class"
        )
    module_name, found = load_plugin(flag, optimizer_type)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        class_name = optimizer_type.rpartition(":")[2]
        raise UserError(f"{flag}: {module_name} has no class {class_name} derived from torch.optim.Optimizer")
    try:
        inspect.signature(found.step).bind("self", "closure")
    except TypeError as error:
        raise UserError(
            f"{flag}: its step() cannot be called with a closure ({error}), as torch's can: write "
            "def step(self, closure=None)"
        ) from error
    return found


def _torch_names():
    """Classes of torch.optim that a step without a closure is enough for: {name in lower case: name}."""
    found = {name.lower(): name for name, kind in vars(torch.optim).items() if inspect.isclass(kind)}
    return {lower: found[lower] for lower in found.keys() - {"optimizer", "lbfgs", "sparseadam", "muon"}}


def parse_optimizer_args(
    optimizer_args: list[str] | None, accepted: set[str], of_flags: set[str], class_name: str
) -> dict:
    """Turn ["momentum=0.9", "nesterov=True"] into keyword arguments, and check their names.

    Args:
        optimizer_args: "key=value" each; a value that is not a Python literal is taken as a string.
        accepted: the names that the constructor takes; of_flags: those among them that flags set.
        class_name: for the message.
    Raises:
        UserError: no "=", a name that the constructor does not take, or one that has a flag of its own.
    """
    parsed = {}
    for item in optimizer_args or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--optimizer_args {item}: not of the form key=value")
        if name in of_flags:
            raise UserError(f"--optimizer_args {item}: use {FLAGS[name]} instead")
        if name not in accepted:
            names = ", ".join(sorted(accepted - of_flags)) or "nothing"
            raise UserError(f"--optimizer_args {item}: {class_name} takes no argument {name}; it takes {names}")
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[name] = value
    return parsed


def _accepted_arguments(optimizer_class: type) -> set[str]:
    """Names of the constructor's keyword arguments; where it hands on **kwargs, those of its parent class too."""
    names = set()
    for base in optimizer_class.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self", "params", "defaults"}  # defaults: torch.optim.Optimizer's own second argument


def _left_to_class(optimizer_class):
    """Which of OF_ADAM are a class's own affair: the library's mean other things by them, others take other forms."""
    if is_of_library(optimizer_class) or getattr(optimizer_class, "own_betas_and_eps", False):
        return set(OF_ADAM)
    parameters = inspect.signature(optimizer_class).parameters
    own = {name: parameters[name].default for name in OF_ADAM if name in parameters}
    return {name for name, value in own.items() if isinstance(value, tuple) and (name == "eps" or len(value) != 2)}


def _groups_for(optimizer_class, weight_decay, model):
    """parameter_groups in the form that a class wants."""
    split = splits_matrices(optimizer_class)
    groups = parameter_groups(model, weight_decay, split or getattr(optimizer_class, "matrices_apart", False))
    for group in groups if split else ():
        group["use_muon"] = group.pop("matrices", False)
    return groups


def _can_be_fused(model: torch.nn.Module) -> bool:
    """Whether one kernel can update all parameters, which saves a pass over memory per operation."""
    devices = ("cpu", "cuda", "meta")  # the last one until the model is cut
    return all(p.device.type in devices and p.is_floating_point() for p in model.parameters())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
