"""Sophia-G: its rule, its estimate of the curvature, and whole runs against a plain loop over stock transformers."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_bad_input import refuse
from test_electra import plain_noise
from test_models import SHAPE, S, Tokenizer
from test_optimizers import arguments, small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import run_clm
import run_pretraining
from causal import OVERRIDES, causal_run
from common import parallel
from common.arguments import DataArguments, ModelArguments, parse_pretraining_arguments
from common.clm_arguments import parse_clm_arguments
from common.curvature import Curvature, label_keys
from common.data.batches import Masking, NextToken, TrainBatches
from common.data.masking import derive_key, random_bits
from common.errors import UserError
from common.models.causal import causal_config
from common.models.footprint import optimizer_state
from common.models.head_loss import head_loss
from common.models.mlm import build_mlm_model
from common.optim.sophia import Sophia
from common.optimizers import build_optimizer, why_not_in_parts
from pretraining import assert_same_run, fp32_copy, losses, results, small_run, training_rows, wait_for_step, weights
from strategies import CASES, command, launch

LABELS = 6  # the stream of keys that labels are drawn by
ALONE = {"rank": 0, "ranks": 1, "device": torch.device("cpu")}
ARGS = ["interval=4", "gamma=30"]  # so that estimates matter: at 0.05 a run as short as these clips every step
SOPHIA = ["--optimizer_type", "sophia", "--learning_rate", 3e-3, "--optimizer_args", *ARGS]


# ---- The rule and the estimate -----------------------------------------------------------------------


class PlainSophia:
    """The rule in float64, over parameters by name. Attribute free: share of a step's numbers that are not clipped."""

    def __init__(self, model, gamma, decays):
        self.model, self.gamma, self.decays = model, gamma, decays
        self.m, self.h = ({n: torch.zeros_like(p).double() for n, p in model.named_parameters()} for _ in range(2))

    def estimate(self, gradients, labels):
        for name, gradient in gradients.items():
            self.h[name] = 0.99 * self.h[name] + 0.01 * labels * gradient.double() ** 2

    def step(self, gradients, rate):
        free = []
        for name, p in self.model.named_parameters():
            self.m[name] = 0.96 * self.m[name] + 0.04 * gradients[name].double()
            ratio = self.m[name] / torch.maximum(self.gamma * self.h[name], torch.tensor(1e-12).double())
            free.append((ratio.abs() < 1).flatten())
            p.data = (p.double() * (1 - rate * self.decays[name]) - rate * ratio.clamp(-1, 1)).float()
        self.free = torch.cat(free).float().mean().item()


def test_the_rule_with_and_without_clipping():
    model, reference = small_model(), small_model()
    model.draws_labels = True
    settings = {"optimizer_type": "sophia", "optimizer_args": ["gamma=10"], "lr_scheduler_type": "linear"}
    optimizer = build_optimizer(model, arguments(**settings))
    decays = {name: 0.1 * (p.ndim == 2) for name, p in model.named_parameters()}
    generator, rule = torch.Generator().manual_seed(1), PlainSophia(reference, 10.0, decays)
    for step in range(30):
        drawn, slopes = (
            {name: scale * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
            for scale in (0.05, 1.0)
        )
        for name, p in model.named_parameters():
            p.grad = drawn[name].clone()
        if step % 10 == 0:
            optimizer.update_curvature(300)
            rule.estimate(drawn, 300)
        for name, p in model.named_parameters():
            p.grad = slopes[name].clone()
        optimizer.step()
        rule.step(slopes, 1e-2)
        assert 0.05 < rule.free < 0.95
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_betas_and_eps_are_its_own_and_values_are_checked():
    model = small_model()
    model.draws_labels = True
    settings = {"optimizer_type": "sophia", "lr_scheduler_type": "linear"}
    optimizer = build_optimizer(model, arguments(**settings))
    assert optimizer.defaults == {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.96, 0.99), "gamma": 0.05, "eps": 1e-12}
    assert optimizer.interval == 10 and why_not_in_parts(optimizer) is None
    changed = build_optimizer(model, arguments(**settings, optimizer_args=["betas=(0.9,0.95)", "interval=3"]))
    assert changed.defaults["betas"] == (0.9, 0.95) and changed.interval == 3
    for wrong in ("gamma=0", "eps=0", "betas=(1.0,0.9)", "interval=0", "interval=2.5"):
        with pytest.raises(UserError, match=f"--optimizer_type sophia: Sophia .*{wrong.partition('=')[0]}"):
            build_optimizer(model, arguments(**settings, optimizer_args=[wrong]))


class Softmax(torch.nn.Module):
    """A linear layer's softmax as a model: k numbers of each of S tokens are looked at."""

    def __init__(self, inputs, number):
        super().__init__()
        self.head, self.inputs = torch.nn.Linear(inputs.shape[-1], number), inputs

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels, weights, loss_denominator, label_keys=None):
        return head_loss(self, self.inputs[input_ids].flatten(0, 1), labels, weights, loss_denominator, label_keys)


def test_the_estimates_mean_is_the_diagonal_of_the_gauss_newton_matrix():
    """4,000 estimates; every number lies where it lies in all but one of 10,000 cases, and labels weigh what they do.

    With p the softmax and x the input of a position, the mean over positions of x_i^2 p_v (1 - p_v).
    """
    torch.manual_seed(0)
    inputs, number = torch.randn(12, 3), 4_000
    model = Softmax(inputs, 5).train()
    with torch.no_grad():
        model.head.weight.mul_(2)
    optimizer = Sophia(model.parameters(), betas=(0.0, 0.0))
    accelerator = parallel.make_accelerator("no")
    model, optimizer = accelerator.prepare(model, optimizer)
    counted = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1]])
    batch = {"input_ids": torch.arange(12).view(4, 3), "labels": torch.zeros(4, 3, dtype=torch.long)}
    batch |= {"weights": counted, "loss_denominator": counted.sum()}
    curvature, seen = Curvature(accelerator, model, optimizer, seed=3), []
    for step in range(number):
        curvature.estimate([(batch, 0, 12)], step)
        seen.append(torch.cat([optimizer.optimizer.state[p]["curvature"].flatten() for p in model.parameters()]))
    seen = torch.stack(seen).double()
    with torch.no_grad():
        x = inputs[counted.flatten() > 0].double()
        p = torch.softmax(F.linear(x, model.head.weight.double(), model.head.bias.double()), dim=1)
        spread = p * (1 - p)
        exact = torch.cat([(spread.T @ x**2).flatten(), spread.sum(dim=0)]) / len(x)
    error = seen.std(dim=0) / number**0.5
    assert ((seen.mean(dim=0) - exact).abs() / error).max() < 4.5  # of 20 numbers
    assert (error / exact).max() < 0.05
    assert all(p.grad is None for p in model.parameters()), "nothing is left for the update"


def test_labels_depend_on_the_seed_the_step_and_the_row_alone():
    whole, half = ({"input_ids": torch.zeros(rows, 3)} for rows in (8, 4))
    keys = label_keys(1, 5, 2, whole)
    assert keys.equal(torch.cat([label_keys(1, 5, number, half) for number in (4, 5)]))
    others = [label_keys(1, 6, 2, whole), label_keys(2, 5, 2, whole), label_keys(1, 5, 3, whole)]
    assert len(torch.cat([keys, *others]).unique()) == 32


# ---- Whole runs against a plain loop -----------------------------------------------------------------


def masked_setting(flags):
    """(rows, objective, training arguments, function of a stock model and a batch giving its logits and labels)."""
    _, data_args, args, _ = parse_pretraining_arguments(list(map(str, flags)))
    corpus, _, rows, _ = run_pretraining.prepare_rows(data_args, print)

    def judge(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        places = batch["masked_positions"][:, :, None].expand(-1, -1, logits.shape[2])
        return logits.gather(1, places), batch["masked_labels"], batch["masked_weights"] > 0

    return rows, Masking.for_tokenizer(corpus.tokenizer, data_args.mlm_probability), args, judge


def causal_setting(flags):
    """As masked_setting."""
    model_args, data_args, args = parse_clm_arguments(list(map(str, flags)))
    _, rows, _, _ = run_clm.prepare_rows(causal_config(model_args, data_args), data_args, print)

    def judge(model, batch):
        return model(input_ids=batch["input_ids"]).logits, batch["labels"], batch["weights"] > 0

    return rows, NextToken(), args, judge


def plain_loop(model, setting, rates):
    """Losses of a run by the definition, with the rate of every step, and the share that each has not clipped."""
    rows, objective, args, judge = setting
    stream = iter(TrainBatches(rows, objective, args.seed, args.train_batch_size, 1, **ALONE))
    decays = {n: args.weight_decay * (p.ndim == 2) for n, p in model.named_parameters()}
    rule, losses, shares, names = PlainSophia(model, 30.0, decays), [], [], [n for n, _ in model.named_parameters()]
    for step, rate in enumerate(rates):
        batch, *_ = next(stream)
        logits, labels, counted = judge(model, batch)
        if step % 4 == 0:
            rows = derive_key(args.seed, step, np.arange(len(labels)), LABELS)
            keys = random_bits(rows[:, None], np.arange(labels.shape[1]))
            noise = plain_noise(torch.from_numpy(keys.view(np.int64)).flatten(), logits.shape[2])
            drawn = torch.from_numpy((logits.detach().double().numpy() + noise.reshape(logits.shape)).argmax(axis=2))
            of_drawn = F.cross_entropy(logits[counted], drawn[counted])
            gradients = torch.autograd.grad(of_drawn, list(model.parameters()), retain_graph=True)
            rule.estimate(dict(zip(names, gradients, strict=True)), counted.sum().item())
        loss = F.cross_entropy(logits[counted], labels[counted])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum((gradient.double() ** 2).sum() for gradient in gradients).sqrt()
        assert norm > args.max_grad_norm
        clipped = (gradient * (args.max_grad_norm / norm).float() for gradient in gradients)
        rule.step(dict(zip(names, clipped, strict=True)), rate)
        losses.append(loss.item())
        shares.append(rule.free)
    return losses, shares


def without_shape(words):
    """A command line for existing weights, which fix the shape."""
    shape = ["--num_hidden_layers", "--hidden_size", "--num_attention_heads", "--intermediate_size"]
    for flag in [*shape, "--config_overrides"]:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return words


STILL = f"{OVERRIDES},dropout=0.0"
MODELS = {  # a command line, the stock class, what the plain loop takes from the flags
    "bert": (small_run, AutoModelForMaskedLM, masked_setting),
    "opt": (partial(causal_run, overrides=STILL), AutoModelForCausalLM, causal_setting),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_equals_the_plain_loop(harness, tiny_corpus, cache, tmp_path, name):
    make, stock, read = MODELS[name]
    start, out = tmp_path / "start", tmp_path / "out"
    harness.run(*make(tiny_corpus, cache, start, steps=1)).check()
    flags = [*SOPHIA, "--max_grad_norm", 0.2, "--weight_decay", 0.1, "--packing", "concat"]
    flags += ["--model_name_or_path", start, "--per_device_train_batch_size", 4]  # of 8: two micro-batches
    words = without_shape(make(tiny_corpus, cache, out, *flags, steps=14))
    harness.run(*words).check()
    rates = [row["learning_rate"] for row in training_rows(out)]
    model, before = stock.from_pretrained(start), stock.from_pretrained(start).state_dict()
    expected, shares = plain_loop(model, read(words[1:]), rates)
    assert list(losses(out).values()) == pytest.approx(expected, abs=1e-5)
    assert min(shares) > 0.05 and max(shares) < 0.95, shares
    mine = weights(out)
    for parameter, tensor in model.named_parameters():
        if not parameter.endswith(("k_proj.bias", "key.bias")):  # of no effect: their gradient is rounding alone
            change = (tensor - before[parameter]).norm()
            assert (mine[parameter] - tensor).norm() < 1e-3 * change + 1e-7, parameter


# ---- However it is cut -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert", "opt"])
def test_accumulation_and_a_growing_batch_change_nothing(harness, tiny_corpus, cache, tmp_path, model):
    for size in (2, 4):
        flags = [*SOPHIA, "--rampup_batch_size", 4, 4, 96, "--per_device_train_batch_size", size]
        harness.run(*command(model, tiny_corpus, cache, tmp_path / str(size), 1, *flags)).check()
    left, right = tmp_path / "2", tmp_path / "4"
    assert [row["grad_norm"] for row in training_rows(left)] != [row["grad_norm"] for row in training_rows(right)]
    assert losses(left) == pytest.approx(losses(right), abs=1e-5) and len(losses(left)) == 20
    assert results(left)["eval_loss"] == pytest.approx(results(right)["eval_loss"], abs=1e-5)


@pytest.fixture(scope="module")
def alone(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a model giving the folder of its run on one process, in two micro-batches of 8 rows."""
    done = {}

    def run(model, *flags):
        if (model, flags) not in done:
            out = tmp_path_factory.mktemp("alone") / "run"
            harness.run(*command(model, tiny_corpus, cache, out, 1, *SOPHIA, *flags)).check()
            done[model, flags] = out
        return done[model, flags]

    return run


OWN = """
import torch


class Own(torch.optim.Optimizer):
    interval = 4

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                h = self.state[p].setdefault("h", torch.zeros_like(p))
                m.lerp_(p.grad, 0.04)
                update = (m / (30 * h).clamp(min=1e-12)).clamp(-1, 1)
                p.data = p.data * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update

    def update_curvature(self, labels):
        for group in self.param_groups:
            for p in group["params"]:
                h = self.state[p].setdefault("h", torch.zeros_like(p))
                self.state[p]["h"] = 0.99 * h + 0.01 * labels * p.grad**2
"""


def test_a_class_from_a_file_is_given_estimates(harness, alone, tiny_corpus, cache, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = ["--optimizer_type", f"{tmp_path}/own.py:Own", "--learning_rate", 3e-3]
    harness.run(*command("bert", tiny_corpus, cache, tmp_path / "out", 1, *own)).check()
    assert losses(tmp_path / "out") == pytest.approx(losses(alone("bert")), abs=1e-5)


@pytest.mark.parametrize("args", [[], ["--optimizer_args", "interval=4"]], ids=["unclipped", "as published"])
@pytest.mark.parametrize("model", ["bert", "opt"])
@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("hsdp", "tensor_parallel"))]
)
def test_processes_compute_what_one_does(harness, alone, tiny_corpus, cache, tmp_path, name, model, args):
    out = tmp_path / "out"
    launch(harness, name, tmp_path, command(model, tiny_corpus, cache, out, CASES[name].readers, *SOPHIA, *args))
    assert losses(out) == pytest.approx(losses(alone(model, *args)), abs=1e-5) and len(losses(out)) == 20
    assert results(out)["eval_loss"] == pytest.approx(results(alone(model, *args))["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("model", ["bert", "opt"])
def test_a_killed_run_continues_bit_for_bit(harness, tiny_corpus, cache, tmp_path, model):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*SOPHIA, "--checkpointing_steps", 7]
    harness.run(*command(model, tiny_corpus, cache, whole, 1, *flags, dropout=0.1, steps=40)).check()
    words = command(model, tiny_corpus, cache, killed, 1, *flags, dropout=0.1, steps=40)
    process = harness.start(*words)
    wait_for_step(process, killed, 16)
    process.kill_group()
    process.wait()
    assert "continuing from" in harness.run(*words, "--resume_from_checkpoint", "latest").check().stdout
    assert_same_run(whole, killed)
    state = torch.load(whole / "step_35" / "optimizer.pt", weights_only=True)["state"]
    assert all({"exp_avg", "curvature"} == kept.keys() for kept in state.values())


def test_a_run_goes_on_on_two_processes(harness, alone, tiny_corpus, cache, tmp_path):
    out = tmp_path / "out"
    first = command("bert", tiny_corpus, cache, out, 1, *SOPHIA, "--checkpointing_steps", 6)
    process = harness.start(*first)
    wait_for_step(process, out, 7)
    process.kill_group()
    process.wait()
    again = command("bert", tiny_corpus, cache, out, 2, *SOPHIA, "--resume_from_checkpoint", "latest")
    assert "continuing from" in launch(harness, "ddp", tmp_path, again)
    assert losses(out) == pytest.approx(losses(alone("bert")), abs=1e-5)


@pytest.mark.parametrize("model", ["bert", "opt"])
def test_bf16_learns(harness, tiny_corpus, cache, tmp_path, model):
    flags = ["--optimizer_type", "sophia", "--learning_rate", 1e-3, "--optimizer_args", "interval=4", "--bf16"]
    flags += ["--init_output_bias", "zeros"] if model == "bert" else []
    words = command(model, tiny_corpus, cache, tmp_path, 1, *flags, "--overwrite_output_dir", steps=60)
    words.remove("--fp32")
    harness.run(*words).check()
    assert results(tmp_path)["precision"] == "bf16"
    first, last = (sum(losses(tmp_path)[step] for step in steps) for steps in (range(1, 6), range(56, 61)))
    assert last < first - 2.5, (first / 5, last / 5)


# ---- Where it cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero2", "pipeline_1f1b", "colossalai_ddp", "colossalai_zero1"])
def test_strategies_whose_backward_pass_leads_to_the_update_refuse_it(harness, tiny_corpus, cache, tmp_path, name):
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    words = small_run(tiny_corpus, cache, tmp_path / "run", *SOPHIA, "--per_device_train_batch_size", 4, steps=2)
    ranks = harness.launch(*words, config=config, num_processes=None)
    assert {rank.returncode for rank in ranks} == {2}
    said = [line for rank in ranks for line in rank.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Sophia wants gradients that are not for an update" in said[0] and "ddp.yaml" in said[0]


@pytest.mark.parametrize("flags", [[], ["--check_arguments"]])
def test_an_electra_refuses_it(harness, tiny_corpus, cache, out, flags):
    words = small_run(tiny_corpus, cache, out, *SOPHIA, "--model_type", "electra", *flags, steps=2)
    refuse(harness, words, "--optimizer_type sophia", "one softmax", "adamw")


@pytest.mark.parametrize("family, objective", [("bert", "nsp"), ("albert", "sop"), ("megatron-bert", "sop")])
def test_two_heads_refuse_it(family, objective):
    torch.manual_seed(0)
    data = DataArguments(max_seq_length=S, sentence_objective=objective)
    model = build_mlm_model(ModelArguments(model_type=family, **SHAPE), data, Tokenizer())
    with pytest.raises(UserError, match="--optimizer_type sophia: .* drop --sentence_objective"):
        build_optimizer(model, arguments(optimizer_type="sophia", lr_scheduler_type="linear"))


def test_fp16_and_other_losses_refuse_it():
    model, args = small_model(), arguments(optimizer_type="sophia", lr_scheduler_type="linear")
    with pytest.raises(UserError, match="--optimizer_type sophia: .* draws labels from one softmax"):
        build_optimizer(model, args)
    model.draws_labels = True
    for precision in ("fp16", "fp8"):
        with pytest.raises(UserError, match=f"{precision} scales: give --bf16 or --fp32"):
            build_optimizer(model, args, precision)


def test_its_memory_is_counted():
    args = arguments(optimizer_type="sophia", optimizer_args=["gamma=0.02"], lr_scheduler_type="linear")
    config = AutoConfig.for_model("opt", hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, ffn_dim=64)
    config.num_attention_heads = 2
    assert optimizer_state(config, args) == 2
