"""Optimizers of pytorch_optimizer by name: found, fed, refused with the reason, and continued bit for bit."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_optimizers import arguments, layered_model, small_model, train, train_layered

from common.errors import UserError
from common.optim.library import library_classes
from common.optimizers import build_optimizer, find_optimizer_class, why_not_in_parts
from harness import REPOSITORY
from pretraining import assert_same_run, fp32_copy, losses, results, small_run, training_rows, wait_for_step, weights

CONSTANT = ["--lr_scheduler_type", "constant"]
NAMED = {  # the flags of a run with each of those that have names of their own
    "lion": ["--learning_rate", 3e-4],
    "adafactor": ["--learning_rate", 1e-2],
    "shampoo": ["--learning_rate", 0.1],
    "soap": ["--learning_rate", 3e-3],
    "schedulefree": ["--learning_rate", 3e-3, *CONSTANT, "--eval_steps", 5],
}
REFUSED = {  # a word of the reason
    "adahessian": "second derivatives",
    "adashift": "checkpoints do not hold",
    "alig": "no argument lr",
    "bsam": "num_data",
    "conda": "checkpoints do not hold",
    "demo": "between processes",
    "distributedmuon": "among processes",
    "friendlysam": "no argument lr",
    "gsam": "no argument lr",
    "kron": "NumPy's random numbers",
    "looksam": "no argument lr",
    "lorarite": "fails where it is tried out",
    "muonclip": "scores of the attention",
    "ranger21": "num_iterations",
    "sam": "no argument lr",
    "scalableshampoo": "checkpoints do not hold",
    "scion": "checkpoints do not hold",
    "scionlight": "checkpoints do not hold",
    "sophiah": "second derivatives",
    "spectralsphere": "2D",
    "wsam": "no argument lr",
}


def build(model, name, **changes):
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "lr_scheduler_type": "constant"} | changes
    return build_optimizer(model, arguments(optimizer_type=name, **settings))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lion", "pytorch_optimizer.optimizer.lion.Lion"),
        ("Lion", "pytorch_optimizer.optimizer.lion.Lion"),
        ("pytorch_optimizer:Lion", "pytorch_optimizer.optimizer.lion.Lion"),
        ("soap", "pytorch_optimizer.optimizer.soap.SOAP"),
        ("shampoo", "pytorch_optimizer.optimizer.shampoo.Shampoo"),
        ("schedule_free", "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeAdamW"),
        ("schedule-free-adamw", "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeAdamW"),
        ("adafactor", "torch.optim.Adafactor"),  # torch's comes first
        ("muon", "common.optim.muon.Muon"),  # and ours before it
        ("sophia", "common.optim.sophia.Sophia"),
    ],
)
def test_a_name_means_ours_then_torchs_then_the_librarys(name, kind):
    found = find_optimizer_class(name)
    assert f"{found.__module__}.{found.__qualname__}" == kind


def test_other_runs_do_not_wait_for_the_library():
    code = (
        "import sys, torch, common.optimizers as o; o.find_optimizer_class('adamw'); o.find_optimizer_class('radam');"
    )
    code += "assert 'pytorch_optimizer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("name", "near"),
    [("lyon", "lion"), ("shampo", "shampoo"), ("adabelif", "adabelief"), ("schedulefre", "schedulefree")],
)
def test_an_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(
        UserError, match=f"--optimizer_type {name}: no such optimizer; did you mean .*{near}.*or choose"
    ):
        build(small_model(), name)


def test_every_class_trains_or_is_refused_with_the_reason():
    """BERT's shapes; what takes no parameters, but another optimizer or a model, is not among the names."""
    refused = {}
    for name, kind in library_classes().items():
        model = layered_model()
        try:
            optimizer = build(model, f"pytorch_optimizer:{kind.__name__}")
        except UserError as error:
            refused[name] = str(error)
            assert "\n" not in refused[name] and refused[name].startswith("--optimizer_type pytorch_optimizer:")
            continue
        trained = train_layered(model, optimizer, steps=3)
        assert all(tensor.isfinite().all() for tensor in trained.values()), name
    assert refused.keys() == REFUSED.keys()
    assert all(REFUSED[name] in reason for name, reason in refused.items())


def test_lion_equals_its_rule_written_out_with_its_own_betas():
    model, reference = small_model(), small_model()
    optimizer = build(model, "lion", learning_rate=1e-2, weight_decay=0.1)
    moments = {parameter: torch.zeros_like(parameter) for parameter in reference.parameters()}

    class Rule:
        @torch.no_grad()
        def step(self):
            for p, m in moments.items():
                decay = 0.1 if p.ndim == 2 else 0.0
                p.copy_(p - 1e-2 * ((0.9 * m + 0.1 * p.grad).sign() + decay * p))
                m.copy_(0.99 * m + 0.01 * p.grad)

        def zero_grad(self):
            reference.zero_grad()

    for left, right in zip(train(model, optimizer), train(reference, Rule()), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_the_librarys_betas_and_eps_are_optimizer_args():
    optimizer = build(small_model(), "lion", optimizer_args=["betas=(0.95, 0.98)"])
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.95, 0.98)}
    assert {group["eps"] for group in build(small_model(), "soap").param_groups} == {1e-8}
    assert {tuple(group["betas"]) for group in build(small_model(), "adan").param_groups} == {(0.98, 0.92, 0.99)}


def test_torchs_adafactor_keeps_its_own_pair_of_eps():
    optimizer = build(small_model(), "adafactor")
    assert optimizer.defaults["eps"] == (None, 1e-3) and not any(
        t.isnan().any() for t in train(small_model(), optimizer)
    )


def test_muons_of_the_library_get_the_hidden_matrices_apart():
    model = layered_model()
    optimizer = build(model, "adamuon", weight_decay=0.1)
    apart = [group for group in optimizer.param_groups if group["use_muon"]]
    assert len(apart) == 1 and len(apart[0]["params"]) == 2 * 6 + 1 and apart[0]["weight_decay"] == 0.1


def test_schedule_free_wants_a_constant_schedule():
    with pytest.raises(
        UserError, match="--lr_scheduler_type linear: ScheduleFreeAdamW .*give --lr_scheduler_type const"
    ):
        build(small_model(), "schedulefree", lr_scheduler_type="linear")


LOOKS, COUNTS = "looks at whole tensors", "counts the steps of all parameters"


@pytest.mark.parametrize(
    ("name", "parts", "in_turn"),
    [
        ("lion", None, None),
        ("adabelief", None, COUNTS),
        ("schedulefree", None, "judges other weights"),
        ("aggmo", "keeps lists", "keeps lists"),
        ("prodigy", LOOKS, LOOKS),  # one number from all parameters
        ("adagc", LOOKS, LOOKS),  # from the hundredth step on
        ("adafactor", LOOKS, LOOKS),
        ("shampoo", LOOKS, LOOKS),
        ("soap", LOOKS, LOOKS),
    ],
)
def test_what_may_be_given_parts_of_tensors(name, parts, in_turn):
    optimizer = build(small_model(), name)
    for reason, expected in ((why_not_in_parts(optimizer), parts), (why_not_in_parts(optimizer, True), in_turn)):
        assert (reason is None) == (expected is None) and (reason or "").startswith(expected or "")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("lion", "schedulefree") else pytest.mark.exhaustive) for name in NAMED],
)
def test_a_killed_run_continues_bit_for_bit(harness, tiny_corpus, cache, tmp_path, name):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--optimizer_type", name, *NAMED[name], "--checkpointing_steps", 7]
    flags += ["--init_output_bias", "zeros", "--max_eval_samples", 8]
    harness.run(*small_run(tiny_corpus, cache, whole, *flags, steps=60)).check()
    first, last = (sum(losses(whole)[step] for step in steps) for steps in (range(1, 6), range(56, 61)))
    assert last < first - 0.5, "it was meant to learn"
    words = small_run(tiny_corpus, cache, killed, *flags, steps=60)
    process = harness.start(*words, pause_at=20)
    wait_for_step(process, killed, 20)
    process.kill_group()
    process.wait()
    assert "continuing from" in harness.run(*words, "--resume_from_checkpoint", "latest").check().stdout
    assert_same_run(whole, killed)


def test_schedule_free_judges_and_saves_the_average(harness, tiny_corpus, cache, tmp_path):
    """y = beta z + (1 - beta) x is trained, x is saved; validating on the way changes nothing."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    flags = ["--optimizer_type", "schedulefree", *NAMED["schedulefree"][:4], "--checkpointing_steps", 20]
    harness.run(*small_run(tiny_corpus, cache, plain, *flags, steps=20)).check()
    harness.run(*small_run(tiny_corpus, cache, watched, *flags, "--eval_steps", 1, steps=20)).check()
    assert training_rows(plain) == training_rows(watched)
    trained = load_file(plain / "step_20/model.safetensors")
    state = torch.load(plain / "step_20/optimizer.pt", weights_only=True)["state"]
    saved, beta = weights(plain), 0.9
    for name, values in state.items():
        average = (trained[name] - (1 - beta) * values["z"]) / beta
        torch.testing.assert_close(saved[name], average, rtol=1e-5, atol=1e-6)
    assert any(not saved[name].allclose(trained[name], atol=1e-4) for name in state)
    again = small_run(tiny_corpus, cache, tmp_path / "again", "--model_name_or_path", plain, "--learning_rate", 1e-30)
    del again[1:9]  # the weights fix the shape
    harness.run(*again, "--max_train_steps", 1).check()
    assert results(tmp_path / "again")["eval_loss"] == pytest.approx(results(plain)["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name, flags", [("adabelief", []), ("schedulefree", [*CONSTANT, "--eval_steps", 3])])
def test_fsdp_computes_the_same(harness, tiny_corpus, cache, tmp_path, name, flags):
    flags = ["--optimizer_type", name, "--learning_rate", 3e-3, "--optimizer_args", "eps=1e-6", *flags]
    flags += ["--per_device_train_batch_size", 4]
    harness.run(*small_run(tiny_corpus, cache, tmp_path / "alone", *flags, steps=8)).check()
    config = fp32_copy("accelerate_configs/fsdp.yaml", tmp_path)
    words = small_run(tiny_corpus, cache, tmp_path / "cut", *flags, steps=8)
    for rank in harness.launch(*words, config=config, num_processes=None):
        rank.check()
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    mine, theirs = results(tmp_path / "cut"), results(tmp_path / "alone")
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "said"), [("soap", LOOKS), ("schedulefree", "judges other weights"), ("yogi", COUNTS)]
)
def test_zero_refuses_with_the_reason(harness, tiny_corpus, cache, tmp_path, name, said):
    config = fp32_copy("accelerate_configs/zero3.yaml", tmp_path)
    flags = ["--optimizer_type", name, *CONSTANT, "--per_device_train_batch_size", 4]
    ranks = harness.launch(
        *small_run(tiny_corpus, cache, tmp_path / "run", *flags, steps=2), config=config, num_processes=None
    )
    assert {rank.returncode for rank in ranks} == {2}
    assert sum(said in rank.stderr for rank in ranks) == 1 and "Traceback" not in ranks[0].stderr
