"""Building an optimizer by name: parameter groups, AdamW against plain torch, a user's own class, and errors."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, MegatronBertConfig, MegatronBertForMaskedLM

from common.errors import UserError
from common.optim.muon import COEFFICIENTS, orthogonalize
from common.optimizers import build_optimizer, hidden_matrices, parameter_groups, why_not_apart, why_not_in_parts

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
MODELS = [(BertForMaskedLM, BertConfig), (MegatronBertForMaskedLM, MegatronBertConfig)]


def arguments(**changes):
    defaults = {
        "optimizer_type": "adamw",
        "optimizer_args": [],
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
    }
    return SimpleNamespace(**(defaults | changes))


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))


def train(model, optimizer, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(32, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("model_class, config_class", MODELS)
def test_groups_hold_every_parameter_once_and_decay_only_matrices(model_class, config_class):
    model = model_class(config_class(**SIZES))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}  # tied ones under their first name
    grouped = decayed["params"] + others["params"]
    assert len(grouped) == len(set(grouped)) == len(names) and set(grouped) == set(names)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in others["params"])
    assert "cls.predictions.bias" in {names[parameter] for parameter in others["params"]}


def test_frozen_parameters_are_left_out_and_no_group_is_empty():
    model = small_model()
    for parameter in (*model[1].parameters(), model[0].bias, model[2].bias):
        parameter.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [2] and groups[0]["weight_decay"] == 0.1


def test_adamw_equals_plain_torch_over_five_steps():
    model, reference = small_model(), small_model()
    optimizer = build_optimizer(model, arguments())
    assert optimizer.defaults["fused"]
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "fused": False, "foreach": False}
    groups = [
        {"params": [reference[0].weight, reference[2].weight], "weight_decay": 0.1},
        {"params": [reference[0].bias, *reference[1].parameters(), reference[2].bias], "weight_decay": 0.0},
    ]
    expected = train(reference, torch.optim.AdamW(groups, **settings))
    actual = train(model, optimizer)
    for before, left, right in zip(small_model().parameters(), actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before, left, atol=1e-3)  # it has moved at all


@pytest.mark.parametrize("model_class, config_class", MODELS)
def test_hidden_matrices_are_the_layers_and_the_heads_transform(model_class, config_class):
    model = model_class(config_class(**SIZES))
    hidden = hidden_matrices(model)
    names = {name for name, parameter in model.named_parameters() if parameter in hidden}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert matrices - names == {name for name in matrices if "embeddings" in name}
    assert len(names) == 2 * 6 + 1 and "cls.predictions.transform.dense.weight" in names
    untied = model_class(config_class(**SIZES, tie_word_embeddings=False))
    assert untied.get_output_embeddings().weight not in hidden_matrices(untied)
    decayed, others, apart = parameter_groups(model, 0.1, matrices_apart=True)
    assert set(apart["params"]) == hidden and apart["matrices"]
    assert [group["weight_decay"] for group in (decayed, others, apart)] == [0.1, 0.0, 0.1]
    grouped = [p for group in (decayed, others, apart) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


def layered_model():
    """Matrices of the same and of other shapes, tall, square and wide, between an embedding and an output."""
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES)).eval()  # without dropout


def train_layered(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(0, SIZES["vocab_size"], (4, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def written_out(model, lr, decay, momentum=0.95):
    """Muon's rule for the hidden matrices, one at a time, and torch's AdamW for the rest: an optimizer."""
    hidden = hidden_matrices(model)
    groups = parameter_groups(model, decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in hidden]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    mean = {p: torch.zeros_like(p) for p in hidden}
    a, b, c = COEFFICIENTS

    @torch.no_grad()
    def step():
        adamw.step()
        for p in hidden:
            mean[p] = momentum * mean[p] + (1 - momentum) * p.grad
            x = momentum * mean[p] + (1 - momentum) * p.grad
            x = x / x.norm()
            for _ in range(5):
                x = a * x + (b * (x @ x.T) + c * (x @ x.T) @ (x @ x.T)) @ x
            p.copy_(p * (1 - lr * decay) - lr * 0.2 * max(p.shape) ** 0.5 * x)

    return SimpleNamespace(step=step, zero_grad=model.zero_grad)


def test_muon_equals_its_rule_written_out_and_adamw_on_the_rest():
    model, reference = layered_model().double(), layered_model().double()  # it enlarges what is rounded off
    actual = train_layered(model, build_optimizer(model, arguments(optimizer_type="muon")))
    expected = train_layered(reference, written_out(reference, lr=1e-2, decay=0.1))
    start = dict(layered_model().double().named_parameters())
    for name in start:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-7, atol=1e-9)
        if start[name].ndim == 2:  # the bias of a key has no gradient
            assert not torch.allclose(start[name], actual[name], atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_muon_multiplies_in_the_precision_of_the_run(precision):
    in_bf16 = precision in ("bf16", "fp8")
    models = [layered_model(), layered_model()]
    built = build_optimizer(models[0], arguments(optimizer_type="muon"), precision)
    settings = ["bf16=true"] if in_bf16 else []
    asked = build_optimizer(models[1], arguments(optimizer_type="muon", optimizer_args=settings))
    left, right = train_layered(models[0], built), train_layered(models[1], asked)
    assert all(left[name].equal(right[name]) for name in left)
    plain = layered_model()
    plain = train_layered(plain, build_optimizer(plain, arguments(optimizer_type="muon")))
    assert all(left[name].equal(plain[name]) for name in left) != in_bf16


def test_muon_leaves_to_adamw_what_is_no_hidden_matrix():
    """With the hidden matrices frozen nothing is left for Muon, and the two agree bit for bit."""
    models = [layered_model(), layered_model()]
    for model in models:
        for parameter in hidden_matrices(model):
            parameter.requires_grad_(False)
    left = train_layered(models[0], build_optimizer(models[0], arguments(optimizer_type="muon")))
    right = train_layered(models[1], build_optimizer(models[1], arguments(optimizer_type="adamw")))
    assert all(left[name].equal(right[name]) for name in left)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (24, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_equals_torchs_muon(dtype, shape):
    """One step of torch.optim.Muon, which works in bf16, from the same gradient."""
    torch.manual_seed(0)
    gradients = torch.randn(3, *shape)
    ours = orthogonalize(gradients.to(dtype))
    assert ours.dtype == dtype
    for gradient, mine in zip(gradients, ours.float(), strict=True):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        optimizer = torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        parameter.grad = gradient
        optimizer.step()
        theirs = -parameter.detach() / (0.2 * max(shape) ** 0.5)
        assert (mine - theirs).norm() < 0.03 * theirs.norm()
        values = torch.linalg.svdvals(mine)
        assert values.min() > 0.3 and values.max() < 1.3


def test_muon_state_survives_a_round_trip():
    model = layered_model()
    optimizer = build_optimizer(model, arguments(optimizer_type="muon"))
    train_layered(model, optimizer, steps=3)
    other = layered_model()
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, arguments(optimizer_type="muon"))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    left, right = train_layered(model, optimizer), train_layered(other, resumed)
    assert all(left[name].equal(right[name]) for name in left)


@pytest.mark.parametrize("name, reference", [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_the_other_names_of_the_registry(name, reference):
    optimizer = build_optimizer(small_model(), arguments(optimizer_type=name))
    assert type(optimizer) is reference
    assert optimizer.param_groups[0]["lr"] == 1e-2 and optimizer.param_groups[0]["weight_decay"] == 0.1


def test_state_survives_a_round_trip():
    model = small_model()
    optimizer = build_optimizer(model, arguments())
    train(model, optimizer, steps=3)
    other = small_model()
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, arguments())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would: loading shares tensors
    for left, right in zip(train(model, optimizer), train(other, resumed), strict=True):
        assert torch.equal(left, right)


def test_optimizer_args_are_literals_or_strings():
    optimizer = build_optimizer(
        small_model(), arguments(optimizer_type="sgd", optimizer_args=["momentum=0.9", "nesterov=True", "fused=False"])
    )
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["fused"]) == (0.9, True, False)


def test_a_library_class_by_module_and_name():
    optimizer = build_optimizer(
        small_model(), arguments(optimizer_type="torch.optim:NAdam", optimizer_args=["momentum_decay=0.01"])
    )
    assert type(optimizer) is torch.optim.NAdam
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["momentum_decay"] == 0.01


OWN_OPTIMIZERS = """
import torch

class SignDescent(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0, scale=1.0, mode="plain"):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale, "mode": mode})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * group["scale"] * p.grad.sign())

class Patient(torch.optim.AdamW):
    def __init__(self, params, patience=3, **kwargs):
        super().__init__(params, **kwargs)
        self.patience = patience

class Fixed(torch.optim.AdamW):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=(0.5, 0.5))

class Bare(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

class Timeless(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

class NotAnOptimizer:
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A file of the user's in the working directory, under a name of its own for each test."""
    name = f"own_optimizers_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN_OPTIMIZERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_a_class_from_the_working_directory(own_module):
    model, reference = small_model(), small_model()
    optimizer = build_optimizer(
        model, arguments(optimizer_type=f"{own_module}:SignDescent", optimizer_args=["scale=0.5", "mode=careful"])
    )
    assert optimizer.defaults["mode"] == "careful"

    def step():  # the same rule written out: matrices decay, vectors do not
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1 - 1e-2 * (0.1 if p.ndim == 2 else 0.0)).sub_(1e-2 * 0.5 * p.grad.sign())

    expected = train(reference, SimpleNamespace(step=step, zero_grad=reference.zero_grad))
    for left, right in zip(train(model, optimizer), expected, strict=True):
        torch.testing.assert_close(left, right)


def test_keyword_arguments_handed_on_to_a_parent_class_count(own_module):
    args = arguments(optimizer_type=f"{own_module}:Patient", optimizer_args=["patience=7", "amsgrad=True"])
    optimizer = build_optimizer(small_model(), args)
    assert optimizer.patience == 7 and optimizer.defaults["amsgrad"]
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-6


def test_a_class_gets_only_what_its_own_constructor_takes(own_module):
    optimizer = build_optimizer(small_model(), arguments(optimizer_type=f"{own_module}:Fixed"))
    assert optimizer.defaults["betas"] == (0.5, 0.5) and optimizer.defaults["lr"] == 1e-2


def test_a_setting_that_the_class_cannot_honour_is_refused(own_module):
    with pytest.raises(UserError, match="Bare takes no argument weight_decay, .*; give --weight_decay 0"):
        build_optimizer(small_model(), arguments(optimizer_type=f"{own_module}:Bare"))
    build_optimizer(small_model(), arguments(optimizer_type=f"{own_module}:Bare", weight_decay=0.0))
    with pytest.raises(UserError, match="Timeless takes no argument lr, so --learning_rate 0.01 would be ignored"):
        build_optimizer(small_model(), arguments(optimizer_type=f"{own_module}:Timeless", weight_decay=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer_type": "adamz"},
            "adamz: no such optimizer; did you mean .*adam.*choose adamw, adam, sgd, lamb, muon, .*module:Class",
        ),
        ({"optimizer_type": ":Class"}, "no such optimizer"),
        ({"optimizer_type": "no_such_module:Class"}, "importing no_such_module .* failed: ModuleNotFoundError"),
        ({"optimizer_type": "torch.optim:AdamZ"}, "torch.optim has no class AdamZ"),
        ({"optimizer_type": "torch.optim:lr_scheduler"}, "has no class lr_scheduler derived from"),
        ({"optimizer_args": ["momentum=0.9"]}, "AdamW takes no argument momentum; it takes amsgrad, "),
        ({"optimizer_args": ["amsgrad"]}, "optimizer_args amsgrad: not of the form key=value"),
        ({"optimizer_args": ["lr=1"]}, "optimizer_args lr=1: use --learning_rate instead"),
        ({"optimizer_args": ["betas=(0.9, 0.9)"]}, "use --adam_beta1 and --adam_beta2 instead"),
        ({"adam_beta1": 1.5}, r"AdamW does not take these arguments \(lr=0.01, .*betas=\(1.5, 0.98\)"),
        ({"optimizer_type": "muon", "optimizer_args": ["momentum=1"]}, r"momentum must lie in \[0, 1\), but is 1"),
        (
            {"optimizer_type": "muon", "optimizer_args": ["ns_step=3"]},
            "no argument ns_step; it takes .*ns_steps",
        ),
        ({"optimizer_type": "sgd", "optimizer_args": ["nesterov=True"]}, "nesterov=True.*requires a momentum"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build_optimizer(small_model(), arguments(**changes))
    assert "\n" not in str(caught.value)


def test_a_class_of_a_file_by_its_path(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\nclass Half(torch.optim.SGD):\n    pass\n")
    half = build_optimizer(small_model(), arguments(optimizer_type=f"{tmp_path}/mine.py:Half"))
    assert type(half).__name__ == "Half" and type(half).__module__ == "frugal_mine" in sys.modules
    with pytest.raises(UserError, match="importing .*none.py failed: FileNotFoundError"):
        build_optimizer(small_model(), arguments(optimizer_type=f"{tmp_path}/none.py:Half"))


def test_a_class_whose_step_takes_no_closure(tmp_path):
    code = "import torch\nclass Bare(torch.optim.SGD):\n    def step(self):\n        return super().step()\n"
    (tmp_path / "bare.py").write_text(code)
    with pytest.raises(UserError, match=r"bare.py:Bare: its step\(\) cannot .*write def step\(self, closure=None\)"):
        build_optimizer(small_model(), arguments(optimizer_type=f"{tmp_path}/bare.py:Bare"))


def test_an_optimizer_of_torch_by_its_name():
    assert type(build_optimizer(small_model(), arguments(optimizer_type="radam"))) is torch.optim.RAdam


def test_what_is_wrong_in_the_users_own_file_is_said(own_module, tmp_path):
    (tmp_path / "broken_optimizer.py").write_text("def half(:\n")
    with pytest.raises(UserError, match="importing broken_optimizer .* failed: SyntaxError: .*line 1"):
        build_optimizer(small_model(), arguments(optimizer_type="broken_optimizer:Half"))
    with pytest.raises(UserError, match="no class NotAnOptimizer derived from torch.optim.Optimizer"):
        build_optimizer(small_model(), arguments(optimizer_type=f"{own_module}:NotAnOptimizer"))


def written_out_lamb(parameters, lr, decay, steps_of_gradients):
    """LAMB as in the paper, in float64: Adam's direction on vectors, on matrices scaled to the matrix's own norm."""
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for t, gradients in enumerate(steps_of_gradients, 1):
        for index, gradient in enumerate(gradients):
            x, (m, v) = parameters[index], moments[index]
            m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
            moments[index] = m, v
            r = (m / (1 - 0.9**t)) / ((v / (1 - 0.98**t)).sqrt() + 1e-6)
            r = r + (decay if x.ndim > 1 else 0.0) * x
            length, size = r.pow(2).sum().sqrt(), x.pow(2).sum().sqrt()
            scale = size / length if x.ndim > 1 and size > 0 and length > 0 else 1.0
            parameters[index] = x - lr * scale * r
    return parameters


def test_lamb_equals_the_paper_written_out():
    generator = torch.Generator().manual_seed(2)
    shapes = [(16, 8), (16,), (4, 16), (3, 5)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    start[-1].zero_()  # a matrix of norm 0 takes Adam's step
    gradients = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(5)]
    model = torch.nn.Module()
    for index, tensor in enumerate(start):
        name = f"p{index}" if tensor.ndim > 1 else f"p{index}_bias"
        model.register_parameter(name, torch.nn.Parameter(tensor.clone()))
    optimizer = build_optimizer(model, arguments(optimizer_type="lamb"))
    for of_step in gradients:
        for parameter, gradient in zip(model.parameters(), of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for left, right in zip(model.parameters(), written_out_lamb(start, 1e-2, 0.1, gradients), strict=True):
        torch.testing.assert_close(left.detach(), right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, expected",
    [("adamw", True), ("adam", True), ("sgd", True), ("torch.optim:NAdam", True)]
    + [("lamb", False), ("muon", False), ("torch.optim:RMSprop", True)],
)
def test_elementwise_optimizers_are_found_out_by_trying(name, expected):
    model = layered_model()
    optimizer = build_optimizer(model, arguments(optimizer_type=name))
    before = [parameter.clone() for parameter in model.parameters()]
    assert (why_not_in_parts(optimizer) is None) is expected
    assert all(left.equal(right) for left, right in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_a_users_own_optimizer_is_tried_too(own_module):
    for name in ("SignDescent", "Patient", "Fixed"):
        optimizer = build_optimizer(small_model(), arguments(optimizer_type=f"{own_module}:{name}"))
        assert why_not_in_parts(optimizer, in_turn=True) is None, name


class Raises(torch.optim.SGD):
    """Knows what it has been given, and only that."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.names = {p: f"parameter {number}" for number, p in enumerate(self.param_groups[0]["params"])}

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            assert self.names[parameter]
        super().step()


@pytest.mark.parametrize("why_not", [why_not_apart, why_not_in_parts])
def test_one_that_fails_when_it_is_tried_out_is_not_proven(why_not):
    optimizer = Raises([torch.nn.Parameter(torch.ones(3, 3))], 0.1)
    assert "looks at" in why_not(optimizer)
