"""Every YAML computes what one process computes, holds what its strategy lets it hold, goes on where it was killed.

20 steps of 16 rows, cut so that every row accumulates 2 micro-batches, with clipping active and dropout 0.
"""

import signal
from typing import NamedTuple

import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from causal import OVERRIDES, causal_run
from common.checkpoint import latest_checkpoint
from harness import REPOSITORY
from pretraining import assert_same_run, fp32_copy, losses, results, small_run, training_rows, wait_for_step, weights


class Case(NamedTuple):
    """strategy: what the run must say it is; ranks; parameters and optimizer: the share of them on each rank."""

    strategy: str
    ranks: int
    parameters: float = 1.0
    optimizer: float = 1.0


CASES = {
    "ddp": Case("data parallel (DDP)", 2),
    "zero1": Case("DeepSpeed ZeRO-1", 2, optimizer=1 / 2),
    "zero2": Case("DeepSpeed ZeRO-2", 2, optimizer=1 / 2),
    "zero3": Case("DeepSpeed ZeRO-3", 2, 1 / 2, 1 / 2),
    "zero2_offload": Case("DeepSpeed ZeRO-2 (optimizer on cpu)", 2, optimizer=1 / 2),
    "zero3_offload": Case("DeepSpeed ZeRO-3 (optimizer on cpu, parameters on cpu)", 2, 1 / 2, 1 / 2),
    "fsdp": Case("FSDP2, cut in 2", 2, 1 / 2, 1 / 2),
    "fsdp_offload": Case("FSDP2, cut in 2, parameters and optimizer on the CPU", 2, 1 / 2, 1 / 2),
    "hsdp": Case("HSDP, 2 copies cut in 2", 4, 1 / 2, 1 / 2),
}
WITHOUT_GROUPS = {"cpu", "single_gpu"}  # one process; see test_parity.py
TWO_MACHINES = {"multi_node", "multi_node_zero"}  # see test_multi_node.py
MODELS = {"bert": AutoModelForMaskedLM, "opt": AutoModelForCausalLM}
GRID = [
    pytest.param(name, model, marks=() if (model == "bert") or name in ("zero2", "fsdp") else pytest.mark.exhaustive)
    for name in CASES
    for model in MODELS
]


def command(model, corpus, cache, out, ranks, *flags, dropout=0.0):
    """20 steps of 16 rows in 2 micro-batches on each of `ranks` processes."""
    flags = ["--per_device_train_batch_size", 8 // ranks, "--learning_rate", 3e-3, "--optimizer_type", "adamw", *flags]
    flags += ["--max_grad_norm", 0.2]
    if model == "bert":
        flags += ["--hidden_dropout_prob", dropout]
        return small_run(corpus, cache, out, *flags, steps=20, batch=16)
    overrides = f"{OVERRIDES},dropout={dropout}"
    return causal_run(corpus, cache, out, *flags, steps=20, batch=16, overrides=overrides)


@pytest.fixture(scope="module")
def single(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a model's name giving the folder of its run on one process."""
    done = {}

    def run(model):
        if model not in done:
            out = tmp_path_factory.mktemp("single") / "run"
            harness.run(*command(model, tiny_corpus, cache, out, 1)).check()
            assert min(row["grad_norm"] for row in training_rows(out)) > 0.2, "clipping was meant to be active"
            done[model] = out
        return done[model]

    return run


def launch(harness, name, tmp_path, words):
    """Run a YAML's ranks to their end. Returns: what rank 0 printed."""
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    ranks = harness.launch(*words, config=config, num_processes=None)
    for rank in ranks:
        rank.check()
    assert len(ranks) == CASES[name].ranks and not any(rank.stdout for rank in ranks[1:])
    return ranks[0].stdout


def test_every_yaml_has_its_row():
    elsewhere = WITHOUT_GROUPS | TWO_MACHINES
    assert {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")} == CASES.keys() | elsewhere


@pytest.mark.parametrize("name, model", GRID)
def test_a_yaml_equals_one_process(harness, single, tiny_corpus, cache, tmp_path, name, model):
    case, one, out = CASES[name], single(model), tmp_path / "run"
    printed = launch(harness, name, tmp_path, command(model, tiny_corpus, cache, out, case.ranks))
    mine, theirs = results(out), results(one)
    assert f"strategy: {case.strategy}, {case.ranks} process(es), fp32" in printed
    assert mine["strategy"] == case.strategy and mine["world_size"] == case.ranks
    assert "2 accumulation" in printed
    apart = max(abs(losses(out)[step] - losses(one)[step]) for step in losses(one))
    print(f"{name} {model}: losses differ by at most {apart:.1e}")
    assert losses(out).keys() == losses(one).keys() and apart < 1e-5
    norms = [[row["grad_norm"] for row in training_rows(folder)] for folder in (out, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert mine["parameter_bytes_per_rank"] == pytest.approx(
        case.parameters * theirs["parameter_bytes_per_rank"], rel=0.02
    )
    assert mine["optimizer_bytes_per_rank"] == pytest.approx(
        case.optimizer * theirs["optimizer_bytes_per_rank"], rel=0.02
    )
    saved, expected = weights(out), weights(one)
    assert saved.keys() == expected.keys()
    assert max(float((saved[key] - expected[key]).abs().max()) for key in saved) < 1e-5
    _, info = MODELS[model].from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("zero2", "fsdp") else pytest.mark.exhaustive) for n in CASES if n != "ddp"],
)
def test_a_killed_run_continues_bit_for_bit(harness, tiny_corpus, cache, tmp_path, name):
    whole, killed, ranks = tmp_path / "whole", tmp_path / "killed", CASES[name].ranks
    flags = ["--checkpointing_steps", 3]
    words = [command("bert", tiny_corpus, cache, out, ranks, *flags, dropout=0.1) for out in (whole, killed)]
    launch(harness, name, tmp_path, words[0])
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    processes = harness.start_ranks(*words[1], config=config, num_processes=None)
    wait_for_step(processes[0], killed, 7)
    for process in processes:
        process.signal(signal.SIGKILL)
    assert [process.wait().returncode for process in processes] == [-9] * ranks
    assert latest_checkpoint(killed).name in ("step_6", "step_9", "step_12", "step_15", "step_18")
    launch(harness, name, tmp_path, [*words[1], "--resume_from_checkpoint", "latest"])
    assert_same_run(whole, killed)


CHANGES = [("zero2", "fsdp"), ("fsdp", "zero3"), ("zero3", "hsdp"), ("hsdp", "ddp"), ("zero1", "zero2_offload")]


@pytest.mark.parametrize(
    "first, second",
    [pytest.param(*pair, marks=() if pair == CHANGES[0] else pytest.mark.exhaustive) for pair in CHANGES],
)
def test_a_run_continues_under_another_yaml(harness, single, tiny_corpus, cache, tmp_path, first, second):
    out, one = tmp_path / "run", single("bert")
    config = fp32_copy(f"accelerate_configs/{first}.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, out, CASES[first].ranks)
    processes = harness.start_ranks(*words, config=config, num_processes=None)
    wait_for_step(processes[0], out, 5)
    processes[0].signal(signal.SIGTERM)
    assert {process.wait().returncode for process in processes} == {143}
    words = command("bert", tiny_corpus, cache, out, CASES[second].ranks, "--resume_from_checkpoint", "latest")
    launch(harness, second, tmp_path, words)
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.parametrize("name", ["zero2", "fsdp"])
def test_an_optimizer_that_needs_whole_tensors_is_refused(harness, tiny_corpus, cache, tmp_path, name):
    words = command("bert", tiny_corpus, cache, tmp_path / "run", 2, "--optimizer_type", "muon")
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    ranks = harness.launch(*words, config=config, num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "error: Muon looks at whole tensors" in ranks[0].stderr and "--optimizer_type adamw" in ranks[0].stderr
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr


@pytest.mark.parametrize("line", ["gradient_clipping: 0.5", "gradient_accumulation_steps: 4"])
def test_a_yaml_that_contradicts_the_command_line_is_refused(harness, tiny_corpus, cache, tmp_path, line):
    config = fp32_copy("accelerate_configs/zero2.yaml", tmp_path)
    config.write_text(config.read_text().replace("  zero_stage: 2", f"  {line}\n  zero_stage: 2"))
    words = command("bert", tiny_corpus, cache, tmp_path / "run", 2)
    ranks = harness.launch(*words, config=config, num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert line.split(":")[0] in ranks[0].stderr and "remove it from the YAML" in ranks[0].stderr
