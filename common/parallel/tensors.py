"""States in torch's own tensors, whole on every process or cut as DTensors. See common.parallel.state."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value):
    """A tensor in one piece; anything else as it is. Every process calls it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def cut_like(value, parameter):
    """A whole tensor of a parameter's shape, cut as the parameter is; anything else as it is."""
    if isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def follow(optimizer, before, model):
    """Let an optimizer that has not stepped yet work on the parameters that a model has now.

    Args:
        optimizer: of torch; before: dict of names by the parameters that the model had; model: torch.nn.Module.
    """
    after = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [after[before[parameter]] for parameter in group["params"]]


def groups_of_one_mesh(groups):
    """Split an optimizer's groups of parameters: one kernel cannot update tensors that are cut over different meshes.

    Args:
        groups: list of dicts, as param_groups.
    Returns:
        the like, in the same order.
    """
    found = []
    for group in groups:
        parts = {}
        for parameter in group["params"]:
            parts.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        found += [{**group, "params": part} for part in parts.values()]
    return found


def saved_settings(saved, name):
    """The settings that a saved optimizer state gives to a parameter: another strategy may have split the groups."""
    group = next(group for group in saved["param_groups"] if name in group["params"])
    return {key: value for key, value in group.items() if key != "params"}


def rest(model):
    """Let go of what fully_shard has made whole for a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def first_names(model):
    """The first name of each name of a parameter; tied ones have several."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    return {name: first[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def whole_weights(model):
    """Yield (name, whole tensor) of every parameter. Every process iterates."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())


@torch.no_grad()
def set_whole_weights(model, weights):
    """Give a model other weights. Args: weights: function of a name giving its whole tensor."""
    for name, parameter in model.named_parameters():
        parameter.copy_(cut_like(weights(name), parameter))


def whole_optimizer_state(optimizer, names):
    """The optimizer's state by name, with whole tensors. Every process calls it.

    Args:
        optimizer: of torch; names: dict of parameters to names.
    Returns:
        dict: state (dict of names to dicts of tensors and numbers), param_groups (their `params` names).
    """
    saved, parameters = optimizer.state_dict(), _numbered(optimizer)
    state = {
        names[parameters[number]]: {key: whole(value) for key, value in values.items()}
        for number, values in saved["state"].items()
    }
    groups = [group | {"params": [names[parameters[n]] for n in group["params"]]} for group in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}


def set_whole_optimizer_state(optimizer, saved, names):
    """Take over what whole_optimizer_state returned, or the like of another strategy."""
    parameters = _numbered(optimizer)
    numbers = {names[parameter]: number for number, parameter in enumerate(parameters)}
    state = {
        numbers[name]: {key: cut_like(value, parameters[numbers[name]]) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    groups = [saved_settings(saved, part[0]) | {"params": [numbers[name] for name in part]} for part in own]
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})


def held_weights(model):
    """The parts of the weights that this process holds."""
    return [_held(parameter.detach()) for parameter in model.parameters()]


def held_state(optimizer):
    """The tensors of the optimizer's state that this process holds."""
    states = optimizer.state_dict()["state"].values()
    return [_held(value) for state in states for value in state.values() if torch.is_tensor(value)]


def _held(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _numbered(optimizer):
    """The parameters in the order in which state_dict() numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
