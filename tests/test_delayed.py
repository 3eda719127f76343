"""PipeDream-2BW equals its definition, computed on one process in delayed_reference.py, whatever drains the stages."""

import itertools
import json
import shutil
import signal

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from common.checkpoint import latest_checkpoint
from common.report import read_metrics
from harness import TESTS
from pipelines import (
    FLAGS,
    LAYERS,
    LIMIT,
    SCRIPTS,
    assert_copies_are_equal,
    command,
    copy_of,
    kill_and_continue,
    launch,
)
from pretraining import (
    SCRIPT,
    assert_same_run,
    losses,
    results,
    small_run,
    training_rows,
    wait_for_step,
    weights,
)

CONFIG = "pipeline_2bw"
STEPS = 10
ROWS = ["--train_batch_size", 16, "--fp32", "--attn_implementation", "sdpa", "--max_seq_length", 64]
ROWS += ["--max_eval_samples", 32, "--max_train_steps", STEPS, "--hidden_dropout_prob", 0]
ROWS += ["--attention_probs_dropout_prob", 0]


@pytest.fixture(scope="module")
def start(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of whether embeddings are tied, giving a folder with a model's weights and its tokenizer."""
    donor, done = tmp_path_factory.mktemp("donor") / "run", {}
    harness.run(*small_run(tiny_corpus, cache, donor, "--num_hidden_layers", LAYERS, steps=1)).check()

    def make(tied):
        if tied not in done:
            folder = tmp_path_factory.mktemp("start")
            torch.manual_seed(0)
            config = BertConfig.from_pretrained(donor, tie_word_embeddings=tied)
            BertForMaskedLM(config).save_pretrained(folder)
            for file in donor.glob("tokenizer*"):
                shutil.copy(file, folder)
            done[tied] = folder
        return done[tied]

    return make


def flags_of(corpus, cache, model, out, *flags):
    data = ["--train_file", corpus, "--cache_dir", cache, "--model_name_or_path", model]
    return [*ROWS, *FLAGS, *data, "--output_dir", out, *flags]


def reference(harness, run, words, copies=1, corrects=0, micro_batches=4):
    """The losses and weights by the definition, with the rates of a run. Returns: (list, dict)."""
    rates = [row["learning_rate"] for row in training_rows(run)]
    out = run.parent / "reference"
    words = [out if word == run else word for word in words]
    harness.run(TESTS / "delayed_reference.py", json.dumps(rates), micro_batches, copies, corrects, *words).check()
    return json.loads((out / "losses.json").read_text()), weights(out)


FIRST = [  # optimizer, tied, evaluation every so many steps, stages, copies
    ("adamw", False, 3, 2, 1),
    ("adamw", True, 7, 2, 1),
    ("muon", False, 7, 2, 2),
]
PRODUCT = itertools.product(("adamw", "muon"), (False, True), (3, 7), (2, 4), (1, 2))
LATER = [("lion", True, 3, 4, 1), *(case for case in PRODUCT if case not in FIRST)]
CASES = [*FIRST, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in LATER)]


@pytest.mark.parametrize("optimizer, tied, interval, stages, copies", CASES)
def test_it_equals_its_definition(
    harness, start, tiny_corpus, cache, tmp_path, shows, optimizer, tied, interval, stages, copies
):
    shows(CONFIG, SCRIPT, stages * copies)
    run = tmp_path / "run"
    flags = ["--optimizer_type", optimizer, "--per_device_train_batch_size", 16 // copies, "--eval_steps", interval]
    flags = flags_of(tiny_corpus, cache, start(tied), run, *flags, "--logging_steps", 1)
    config = copy_of(CONFIG, tmp_path, stages=stages)
    printed = launch(harness, [SCRIPT, *flags], config, stages * copies)
    assert f"pipeline, PipeDream-2BW, {stages} stages, 4 micro-batches" in printed
    assert ("one step late" in printed) == (optimizer == "adamw")
    expected, whole = reference(harness, run, [SCRIPT, *flags], copies)
    told = losses(run)
    assert min(row["grad_norm"] for row in training_rows(run)[1:]) > LIMIT, "clipping was meant to be active"
    assert [told[step + 1] for step in range(1, STEPS)] == pytest.approx(expected[:-1], abs=1e-5)
    judged = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row]
    assert judged == [*range(interval, STEPS, interval), STEPS]
    assert [row["loss_step"] for row in training_rows(run)] == [1, *range(1, STEPS)]
    mine = weights(run)
    first = [key for key in mine if "embeddings" in key or any(f"layer.{n}." in key for n in range(LAYERS // stages))]
    own = 4 * sum(mine[key].numel() for key in first)
    assert results(run)["parameter_bytes_per_rank"] == 2 * own, "two versions of the first stage's weights"
    same = [mine[name].equal(whole[name]) for name in whole if name in mine]
    apart = max(float((mine[name] - whole[name]).abs().max()) for name in whole if name in mine)
    print(f"{optimizer}, tied {tied}: weights differ by at most {apart:.1e}")
    assert len(same) > 60 and (all(same) if not tied else apart < 1e-5)


@pytest.mark.exhaustive
def test_two_rounds_of_micro_batches_equal_their_definition(harness, start, tiny_corpus, cache, tmp_path):
    run = tmp_path / "run"
    flags = flags_of(tiny_corpus, cache, start(True), run, "--optimizer_type", "adamw", "--logging_steps", 1)
    flags[flags.index("--per_device_train_batch_size") + 1] = 8
    assert "8 per device x 2 accumulation" in launch(harness, [SCRIPT, *flags], copy_of(CONFIG, tmp_path))
    expected, whole = reference(harness, run, [SCRIPT, *flags], micro_batches=8)
    assert [losses(run)[step + 1] for step in range(1, STEPS)] == pytest.approx(expected[:-1], abs=1e-5)
    assert max(float((tensor - whole[name]).abs().max()) for name, tensor in weights(run).items()) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.exhaustive)])
def test_corrected_updates_equal_their_definition(harness, start, tiny_corpus, cache, tmp_path, optimizer):
    """Bit for bit, and a run that is continued equals one that is not."""
    config = tmp_path / "corrected.yaml"
    config.write_text(copy_of(CONFIG, tmp_path).read_text().replace("schedule=2bw ", "schedule=2bw_corrected "))
    run, continued = tmp_path / "run", tmp_path / "continued"
    flags = ["--optimizer_type", optimizer, "--per_device_train_batch_size", 16, "--checkpointing_steps", 5]
    words = [SCRIPT, *flags_of(tiny_corpus, cache, start(False), run, *flags, "--logging_steps", 1)]
    assert "PipeDream-2BW with corrected updates, 2 stages" in launch(harness, words, config)
    expected, whole = reference(harness, run, words, corrects=1)
    assert [losses(run)[step + 1] for step in range(1, STEPS)] == pytest.approx(expected[:-1], abs=1e-5)
    mine = weights(run)
    assert all(mine[name].equal(whole[name]) for name in whole if name in mine) and len(mine) > 60
    words = [continued if word == run else word for word in words]
    launch(harness, [*words, "--resume_from_checkpoint", run / "step_5"], config)
    assert training_rows(continued) == training_rows(run)[5:]
    assert all(weights(continued)[name].equal(tensor) for name, tensor in mine.items())


def test_the_losses_of_a_batch_that_grows_are_its_own(harness, start, tiny_corpus, cache, tmp_path):
    """From one call in a step to two, then to three, also where a run is continued there."""
    run, config = tmp_path / "run", copy_of(CONFIG, tmp_path)
    flags = ["--rampup_batch_size", 8, 8, 48, "--per_device_train_batch_size", 8, "--logging_steps", 1]
    flags += ["--checkpointing_steps", 3, "--save_total_limit", 9]
    flags = flags_of(tiny_corpus, cache, start(False), run, *flags)
    flags[flags.index("--train_batch_size") + 1] = 24
    words = [SCRIPT, *flags]
    launch(harness, words, config)
    expected, whole = reference(harness, run, words)
    told, mine = losses(run), weights(run)
    assert told[1] == pytest.approx(expected[0], abs=1e-5), "the first step has no other"
    assert [told[step + 1] for step in range(1, STEPS)] == pytest.approx(expected[:-1], abs=1e-5)
    assert all(mine[name].equal(whole[name]) for name in whole if name in mine) and len(mine) > 60
    continued = tmp_path / "continued"
    words = [continued if word == run else word for word in words]
    launch(harness, [*words, "--resume_from_checkpoint", run / "step_3"], config)
    assert training_rows(continued) == training_rows(run)[3:]


@pytest.fixture(scope="module")
def undisturbed(harness, tiny_corpus, cache, tmp_path_factory):
    """A run with dropout that nothing has drained before its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = command("bert", tiny_corpus, cache, folder / "run", dropout=0.1, steps=20)
    launch(harness, words, copy_of(CONFIG, folder))
    return folder / "run"


def test_recomputing_uses_the_weights_and_the_dropout_of_its_forward_pass(
    harness, undisturbed, tiny_corpus, cache, tmp_path
):
    """And validation drains it at steps of its own."""
    out, flags = tmp_path / "recomputed", ["--gradient_checkpointing", "--eval_steps", 3]
    words = command("bert", tiny_corpus, cache, out, *flags, dropout=0.1, steps=20)
    launch(harness, words, copy_of(CONFIG, tmp_path))
    assert_same_run(undisturbed, out)


def test_a_killed_run_continues_bit_for_bit(harness, undisturbed, tiny_corpus, cache, tmp_path, shows):
    """Against one without checkpoints and validation."""
    shows(CONFIG, SCRIPT, 2)
    out, flags = tmp_path / "killed", ["--checkpointing_steps", 3, "--eval_steps", 7]
    words = command("bert", tiny_corpus, cache, out, *flags, dropout=0.1, steps=20)
    kill_and_continue(harness, words, out, copy_of(CONFIG, tmp_path))
    assert_same_run(undisturbed, out)
    assert_copies_are_equal(latest_checkpoint(out), "state", "previous")


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_signal_to_one_stage_stops_all_after_the_same_step(harness, undisturbed, tiny_corpus, cache, tmp_path, rank):
    """The first stage hears of the other's a step later; continued, it is as if there had been none."""
    out, config = tmp_path / "stopped", copy_of(CONFIG, tmp_path)
    words = command("bert", tiny_corpus, cache, out, dropout=0.1, steps=20)
    processes = harness.start_ranks(*words, config=config, num_processes=None, pause_at=3)
    wait_for_step(processes[0], out, 3)
    processes[rank].signal(signal.SIGTERM)
    for process in processes:
        process.signal(signal.SIGCONT)  # one of them paused
    assert {process.wait(timeout=60).returncode for process in processes} == {128 + signal.SIGTERM}
    launch(harness, [*words, "--resume_from_checkpoint", "latest"], config)
    assert_same_run(undisturbed, out)


@pytest.mark.parametrize(("name", "last"), [(CONFIG, 3), ("pipeline_1f1b", None)])
def test_a_cap_is_looked_after_where_processes_wait_anyhow(harness, tiny_corpus, cache, tmp_path, name, last):
    """When a loss is logged; where each step ends with a flush, after each of them."""
    out, flags = tmp_path / "run", ["--mem_cap", 100, "--logging_steps", 4, "--checkpointing_steps", 1]
    _, *words = command("opt", tiny_corpus, cache, out, *flags)
    ranks = harness.launch(TESTS / "capped_run.py", *words, config=copy_of(name, tmp_path), num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "above the memory cap of 100 GB" in ranks[0].stderr and "Traceback" not in ranks[0].stderr
    found = latest_checkpoint(out)
    assert found.name == f"step_{last}" if last else found is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("stages", [2, 4])
def test_opt_equals_its_definition(harness, tiny_corpus, cache, tmp_path, shows, stages):
    """Tied, and validated at steps of its own."""
    shows(CONFIG, SCRIPTS["opt"], stages)
    run = tmp_path / "run"
    words = command("opt", tiny_corpus, cache, run, "--eval_steps", 3, steps=STEPS)
    launch(harness, words, copy_of(CONFIG, tmp_path, stages=stages), stages)
    expected, whole = reference(harness, run, words)
    told, mine = losses(run), weights(run)
    assert [told[step + 1] for step in range(1, STEPS)] == pytest.approx(expected[:-1], abs=1e-5)
    assert whole.keys() == mine.keys() and max(float((mine[n] - whole[n]).abs().max()) for n in mine) < 1e-5
