"""Weights that are drawn when they are asked for are those of the ordinary construction, to the last bit."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.arguments import DataArguments, ModelArguments
from common.data.glue import TASKS
from common.models.classifier import build_classifier
from common.models.families import FAMILIES
from common.models.mlm import build_mlm_model
from common.parallel.draws import build_shapes
from common.parallel.parts import load_shapes, whole_numbers

SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
KINDS = [
    (name, objective) for name, family in FAMILIES.items() for objective in ("none", "sop")[: 1 + bool(family.pairs)]
]


class Tokenizer:
    pad_token_id = 0

    def __len__(self):
        return 80

    def get_vocab(self):
        return {str(number): number for number in range(80)}


def numbers(model):
    """The weights by name, and the generator's state."""
    state = torch.get_rng_state()
    if not hasattr(model, "places"):
        return dict(model.named_parameters()), state
    assert all(parameter.is_meta for parameter in model.parameters())
    with whole_numbers(model) as read:
        return {name: read(name) for name, _ in model.named_parameters()}, state


def equal(lazy, whole):
    """Whether a lazy model is a whole one, with its numbers and its buffers, and leaves the same next draw."""
    assert hasattr(lazy[0], "places") and not hasattr(whole[0], "places")
    buffers = [dict(model.named_buffers()) for model, _ in (lazy, whole)]
    assert buffers[0].keys() == buffers[1].keys() and all(
        buffers[0][name].equal(buffers[1][name]) for name in buffers[0]
    )
    (mine, _), (theirs, _) = numbers(lazy[0]), numbers(whole[0])
    assert list(mine) == list(theirs)
    return all(mine[name].equal(theirs[name]) for name in mine) and lazy[1].equal(whole[1])


def seeded(build):
    """(what a function returns, the generator's state behind it)."""
    torch.manual_seed(3)
    return build(), torch.get_rng_state()


def start(model):
    with torch.no_grad():
        model.get_output_embeddings().bias.copy_(torch.arange(len(model.get_output_embeddings().bias)))


@pytest.mark.parametrize(("family", "objective"), KINDS)
def test_models_to_pretrain(family, objective):
    """With what is done to their weights afterwards: Megatron's smaller projections, a bias of frequencies."""
    size = {"model_size": "110m"} if family == "megatron-bert" else {}
    model_args, data_args = ModelArguments(model_type=family, **SHAPE, **size), DataArguments(max_seq_length=32)
    data_args.sentence_objective = objective
    given = model_args, data_args, Tokenizer()
    lazy = seeded(lambda: build_mlm_model(*given, build=build_shapes, begin=start))
    whole = seeded(lambda: build_mlm_model(*given, begin=start))
    assert whole[0].get_output_embeddings().bias[7] == 7
    assert equal(lazy, whole)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "electra"])
def test_classifiers_whose_heads_are_random(family, tmp_path):
    data_args = DataArguments(max_seq_length=32)
    build_mlm_model(ModelArguments(model_type=family, **SHAPE), data_args, Tokenizer()).save_pretrained(tmp_path)
    args = SimpleNamespace(model_name_or_path=str(tmp_path), random_weights=False, ignore_mismatched_sizes=False)
    vars(args).update(cache_dir=None, trust_remote_code=False)
    lazy, whole = (
        seeded(lambda how=how: build_classifier(args, TASKS["mnli"], **how)) for how in ({"load": load_shapes}, {})
    )
    assert equal(lazy, whole)
    task = TASKS["stsb"]  # whose head has another size
    whole[0].save_pretrained(tmp_path)
    args.ignore_mismatched_sizes = True
    lazy, whole = (seeded(lambda how=how: build_classifier(args, task, **how)) for how in ({"load": load_shapes}, {}))
    assert equal(lazy, whole)


class Layer(nn.Module):
    """All that torch.nn.init leaves undone on the meta device; a bound that few numbers keep."""

    def __init__(self, last):
        super().__init__()
        self.constant, self.empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(4, 5))
        self.inner = nn.Linear(5, 6)
        last(self.inner.weight)
        nn.init.trunc_normal_(self.empty, a=1.0, b=1.1)


LAST = {
    "orthogonal": lambda tensor: nn.init.orthogonal_(tensor),
    "sparse": lambda tensor: nn.init.sparse_(tensor, 0.5),
    "truncated": lambda tensor: nn.init.trunc_normal_(tensor, std=0.5),
    "a part": lambda tensor: nn.init.normal_(tensor[1:3]),
    "a constant": lambda tensor: nn.init.constant_(tensor, 0.3),
}


@pytest.mark.parametrize("last", LAST)
def test_other_ways_to_begin(last):
    build = lambda: Layer(lambda tensor: LAST[last](tensor))  # noqa: E731
    assert equal(seeded(lambda: build_shapes(build)), seeded(build))


class Changed(nn.Module):
    def __init__(self):
        super().__init__()
        numbers = torch.zeros(4)
        numbers[2] = 5
        self.numbers = nn.Parameter(numbers)


ALONE = {
    "depends on numbers": lambda: Layer(lambda tensor: tensor.data.mul_(tensor)),
    "a generator of its own": lambda: Layer(lambda tensor: nn.init.normal_(tensor, generator=torch.Generator())),
    "changed before": Changed,
}


@pytest.mark.parametrize("what", ALONE)
def test_what_cannot_wait_is_built_whole(what):
    lazy, whole = (seeded(build) for build in (lambda: build_shapes(ALONE[what]), ALONE[what]))
    assert not hasattr(lazy[0], "places") and lazy[1].equal(whole[1])
    assert all(mine.equal(theirs) for mine, theirs in zip(lazy[0].parameters(), whole[0].parameters(), strict=True))
