"""Optimizers of the pytorch_optimizer library by their names, and what of them cannot be trained with here.

The library is imported where it is asked for: it takes a second that other runs need not wait.
"""

import inspect
import io
from pickle import UnpicklingError

import torch

from common.errors import UserError

ALIASES = {"schedulefree": "ScheduleFreeAdamW"}  # names that people say for a class's own
SPLIT = ("AdaGO", "AdaMuon", "Muon", "NorMuon")  # want groups that say use_muon
CURVATURE = (
    "estimates curvature by second derivatives, which the attention and the loss of these models do not have: "
    "give --optimizer_type sophia, which needs none, or soap"
)
UNFIT = {
    "AdaHessian": CURVATURE,
    "SophiaH": CURVATURE,
    "MuonClip": "clips by the scores of the attention, which it is not shown: give --optimizer_type muon",
    "DistributedMuon": "divides the work among processes by itself, which YAMLs do here: give --optimizer_type muon",
    "DeMo": "sends gradients between processes by itself, which YAMLs do here: give --optimizer_type adamw",
    "Kron": "draws from NumPy's random numbers, which checkpoints do not hold: give --optimizer_type soap",
}
TRIED_STEPS = 12  # before the copy and after it: a few of every period by default


def library_classes() -> dict[str, type[torch.optim.Optimizer]]:
    """The library's own optimizers that take parameters, by name in lower case; aliases too.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise UserError(f"pytorch_optimizer cannot be imported ({error}): pip install -r requirements.txt") from error
    kinds = [kind for kind in vars(pytorch_optimizer).values() if inspect.isclass(kind) and is_of_library(kind)]
    found = {kind.__name__.lower(): kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)}
    found = {name: kind for name, kind in found.items() if "params" in inspect.signature(kind).parameters}
    return found | {alias: found[name.lower()] for alias, name in ALIASES.items()}


def is_of_library(kind: type) -> bool:
    """Whether a class is one of the library's."""
    return kind.__module__.startswith("pytorch_optimizer.")


def unfit(kind: type) -> str | None:
    """Why a class is known not to do here, with the remedy."""
    return UNFIT.get(kind.__name__) if is_of_library(kind) else None


def splits_matrices(kind: type) -> bool:
    """Whether a class wants the hidden matrices in a group of their own, marked use_muon."""
    return is_of_library(kind) and kind.__name__ in SPLIT


def is_schedule_free(kind: type) -> bool:
    """Whether a class averages the weights of a run in place of lowering its learning rate."""
    return is_of_library(kind) and kind.__name__.startswith("ScheduleFree")


def why_not_train(make, groups) -> str | None:
    """Why a class of the library cannot be trained with: tried out on a few layers, saved and continued.

    Args:
        make: function of groups of parameters giving an optimizer with a run's arguments.
        groups: function of a module giving its groups of parameters.
    Returns:
        the reason with its remedy, None where there is none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, twin = _small_model(), _small_model()
        try:
            optimizer = make(groups(model))
            _try(optimizer, model, seed=1)
            twin.load_state_dict(model.state_dict())
            continued = make(groups(twin))
            continued.load_state_dict(_through_a_file(optimizer.state_dict()))
            _try(optimizer, model, seed=2)
            _try(continued, twin, seed=2)
        except UnpicklingError:
            return "keeps more than tensors and numbers in its state, which checkpoints do not hold: choose another"
        except Exception as error:  # it is the library's
            return f"fails where it is tried out, {type(error).__name__}: {' '.join(str(error).split())}"
    if not all(left.equal(right) for left, right in zip(model.parameters(), twin.parameters(), strict=True)):
        return "does not save all that it needs, so that a continued run would go another way: choose another"
    return None


def _small_model():
    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    return torch.nn.Sequential(torch.nn.Embedding(10, 6), linear(6, 8), norm(8), linear(8, 4))


def _try(optimizer, model, seed):
    generator = torch.Generator().manual_seed(seed)
    for step in range(TRIED_STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch.manual_seed(step)  # as every step of a run does
        optimizer.step()


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
