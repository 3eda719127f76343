"""A pipeline computes what one process computes, by every schedule that flushes; test_delayed.py is of the other."""

import itertools
import json
import signal

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from common.checkpoint import latest_checkpoint
from common.convert_checkpoint import convert
from harness import TESTS, wait_all
from pipelines import LAYERS, LIMIT, SCRIPTS, assert_copies_are_equal, command, copy_of, kill_and_continue, launch
from pretraining import SCRIPT, assert_same_run, losses, results, small_run, training_rows, wait_for_step, weights

FIRST = [  # YAML, model, processes of a pipeline, copies; an interleaved one has two stages on a process
    ("pipeline_gpipe", "bert", 2, 1),
    ("pipeline_1f1b", "opt", 2, 1),
    ("pipeline_interleaved", "bert", 2, 1),
    ("pipeline_1f1b", "bert", 2, 2),
    ("pipeline_1f1b", "albert", 2, 1),
]
FAMILIES = ("megatron-bert", "roberta", "deberta", "deberta-v2", "modernbert")
PRODUCT = itertools.product(
    ("pipeline_gpipe", "pipeline_1f1b", "pipeline_interleaved"), ("bert", "opt"), (2, 4), (1, 2)
)
LATER = [*(row for row in PRODUCT if row not in FIRST), *(("pipeline_1f1b", model, 2, 1) for model in FAMILIES)]
ROWS = [*FIRST, *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in LATER)]
HALF = 2  # of the four layers are on the first of two stages


@pytest.fixture(scope="module")
def single(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a model's name giving the folder of its run on one process."""
    done = {}

    def run(model, layers=4):
        if (model, layers) not in done:
            out = tmp_path_factory.mktemp("single") / "run"
            harness.run(*command(model, tiny_corpus, cache, out, layers=layers)).check()
            done[model, layers] = out
        return done[model, layers]

    return run


@pytest.mark.parametrize("name, model, places, copies", ROWS)
def test_a_schedule_equals_one_process(
    harness, single, tiny_corpus, cache, tmp_path, shows, name, model, places, copies
):
    stages, processes = (2 if "interleaved" in name else 1) * places, places * copies
    layers = max(LAYERS, stages)
    yaml = "pipeline_1f1b_dp" if name == "pipeline_1f1b" and copies > 1 else name
    config = copy_of(yaml, tmp_path, stages=stages)
    one, out = single(model, layers), tmp_path / "run"
    shows(yaml, SCRIPTS.get(model, SCRIPT), processes)
    words = command(model, tiny_corpus, cache, out, "--per_device_train_batch_size", 16 // copies, layers=layers)
    printed = launch(harness, words, config, processes)
    assert "strategy: pipeline, " in printed and f" {stages} stages, " in printed
    assert f"{processes} process(es), fp32" in printed and (f"{copies} copies" in printed) == (copies > 1)
    saved = assert_equal_to_one_process(out, one)
    auto = AutoModelForCausalLM if model == "opt" else AutoModelForMaskedLM
    loaded, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight, "it was meant to be tied"
    if model == "bert" and stages == 2:
        first = [key for key in saved if "embeddings" in key or any(f"layer.{n}." in key for n in range(HALF))]
        own = sum(saved[key].numel() * 4 for key in first)
        assert results(out)["parameter_bytes_per_rank"] == own
        assert results(out)["optimizer_bytes_per_rank"] == pytest.approx(2 * own, rel=0.01)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["pipeline_gpipe", "pipeline_1f1b", "pipeline_interleaved"])
def test_two_rounds_of_micro_batches_equal_one_process(harness, single, tiny_corpus, cache, tmp_path, name):
    config = copy_of(name, tmp_path, stages=4 if "interleaved" in name else 2)
    words = command("bert", tiny_corpus, cache, tmp_path / "run", "--per_device_train_batch_size", 8)
    assert "8 per device x 2 accumulation" in launch(harness, words, config, 2)
    assert_equal_to_one_process(tmp_path / "run", single("bert"))


def assert_equal_to_one_process(out, one):
    """Losses, norms, what is judged and the weights. Returns: the weights by name."""
    apart = max(abs(losses(out)[step] - losses(one)[step]) for step in losses(one))
    print(f"losses differ by at most {apart:.1e}")
    assert losses(out).keys() == losses(one).keys() and apart < 1e-5
    norms = [[row["grad_norm"] for row in training_rows(folder)] for folder in (out, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > LIMIT, "clipping was meant to be active"
    assert results(out)["eval_loss"] == pytest.approx(results(one)["eval_loss"], abs=1e-5)
    saved, expected = weights(out), weights(one)
    assert saved.keys() == expected.keys()
    assert max(float((saved[key] - expected[key]).abs().max()) for key in saved) < 1e-5
    return saved


@pytest.fixture(scope="module")
def partitioned(harness, tiny_corpus, cache, tmp_path_factory):
    """A finished run whose checkpoints have a file for each stage."""
    folder = tmp_path_factory.mktemp("partitioned")
    words = command("bert", tiny_corpus, cache, folder / "run", "--checkpointing_steps", 5)
    launch(harness, words, copy_of("pipeline_1f1b", folder))
    return folder / "run"


def test_one_flush_makes_it_plain_training_and_none_does_not(
    harness, single, partitioned, tiny_corpus, cache, tmp_path, shows
):
    """1F1B and PipeDream-2BW with the same micro-batches."""
    shows("pipeline_1f1b", SCRIPT, 2)
    assert_equal_to_one_process(partitioned, single("bert"))
    out = tmp_path / "run"
    launch(harness, command("bert", tiny_corpus, cache, out), copy_of("pipeline_2bw", tmp_path))
    plain, delayed = losses(single("bert")), losses(out)  # told a step later
    assert delayed[2] == pytest.approx(plain[1], abs=1e-5), "the first batch's weights are the same"
    assert min(abs(delayed[step + 1] - plain[step]) for step in range(4, 10)) > 1e-4
    assert results(out)["eval_loss"] != pytest.approx(results(single("bert"))["eval_loss"], abs=1e-4)


def test_a_checkpoint_of_stages_loads_and_is_merged(partitioned, tmp_path):
    checkpoint = latest_checkpoint(partitioned)
    parts = [load_file(path) for path in sorted(checkpoint.glob("model-*-of-00002.safetensors"))]
    assert not parts[0].keys() & parts[1].keys() and len(parts) == 2
    assert any(".layer.0." in key for key in parts[0]) and any(".layer.3." in key for key in parts[1])
    assert_copies_are_equal(checkpoint, "state")
    files = convert(checkpoint, tmp_path / "merged")
    assert "model.safetensors" in files
    models = [AutoModelForMaskedLM.from_pretrained(path) for path in (partitioned, checkpoint, tmp_path / "merged")]
    final, *others = (model.state_dict() for model in models)
    for other in others:
        assert other.keys() == final.keys() and all(other[key].equal(final[key]) for key in final)
    _, info = AutoModelForMaskedLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_run_continues_under_another_strategy(harness, single, partitioned, tiny_corpus, cache, tmp_path):
    """A pipeline's checkpoint on one process, and that one's in a pipeline of other stages."""
    out = tmp_path / "run"
    words = command("bert", tiny_corpus, cache, out, "--resume_from_checkpoint", partitioned / "step_5")
    harness.run(*words, "--checkpointing_steps", 2).check()
    assert losses(out) == pytest.approx({k: v for k, v in losses(single("bert")).items() if k > 5}, abs=1e-5)
    again = tmp_path / "again"
    words = command("bert", tiny_corpus, cache, again, "--resume_from_checkpoint", out / "step_8")
    launch(harness, words, copy_of("pipeline_interleaved", tmp_path))
    assert losses(again) == pytest.approx({k: v for k, v in losses(single("bert")).items() if k > 8}, abs=1e-5)


@pytest.fixture(scope="module")
def dropping(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a YAML's name giving the folder of its run with dropout, and without checkpoints."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp("dropping") / "run"
            words = command("bert", tiny_corpus, cache, done[name], dropout=0.1, steps=20)
            launch(harness, words, copy_of(name, done[name].parent))
        return done[name]

    return run


SYNCHRONOUS = [
    "pipeline_1f1b",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("pipeline_gpipe", "pipeline_interleaved")),
]


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_recomputing_drops_the_same(harness, dropping, tiny_corpus, cache, tmp_path, name):
    out = tmp_path / "recomputed"
    words = command("bert", tiny_corpus, cache, out, "--gradient_checkpointing", dropout=0.1, steps=20)
    launch(harness, words, copy_of(name, tmp_path))
    assert_same_run(dropping(name), out)


@pytest.mark.exhaustive
def test_stages_drop_different_numbers(harness, single, tiny_corpus, cache, tmp_path):
    """With dropout nothing is what it is without, and it depends on the seed."""
    found = [losses(single("bert"))[2]]
    for seed in (1, 2):
        out = tmp_path / f"{seed}"
        flags = ["--max_train_steps", 2, "--seed", seed]
        words = command("bert", tiny_corpus, cache, out, *flags, dropout=0.1)
        launch(harness, words, copy_of("pipeline_1f1b", tmp_path))
        found.append(losses(out)[2])
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_a_killed_run_continues_bit_for_bit(harness, dropping, tiny_corpus, cache, tmp_path, name):
    out = tmp_path / "killed"
    words = command("bert", tiny_corpus, cache, out, "--checkpointing_steps", 3, dropout=0.1, steps=20)
    kill_and_continue(harness, words, out, copy_of(name, tmp_path))
    assert_same_run(dropping(name), out)


ENDS = [  # YAML, processes, the one that ends, what the others call it
    ("pipeline_1f1b", 2, 1, "process 1 (stage 2 of 2)"),
    ("pipeline_2bw", 2, 0, "process 0 (stage 1 of 2)"),
    ("pipeline_gpipe", 2, 0, "process 0 (stage 1 of 2)"),
    ("pipeline_interleaved", 2, 1, "process 1 (stage 2, 4 of 4)"),
    ("pipeline_2bw", 2, 1, "process 1 (stage 2 of 2)"),
    ("pipeline_2bw", 4, 3, "process 3 (stage 2 of 2 in copy 2)"),
    ("pipeline_1f1b_dp", 4, 2, "process 2 (stage 1 of 2 in copy 2)"),
]


def exhaustive_but(first):
    """The cases of ENDS; only one of them is not marked exhaustive. Args: first: its number."""
    return [row if row is ENDS[first] else pytest.param(*row, marks=pytest.mark.exhaustive) for row in ENDS]


@pytest.mark.parametrize("name, world, victim, called", exhaustive_but(0))
def test_a_stage_that_dies_ends_the_others_with_its_name(
    harness, tiny_corpus, cache, tmp_path, name, world, victim, called
):
    out = tmp_path / "run"
    words = command("bert", tiny_corpus, cache, out, "--per_device_train_batch_size", 8, steps=100_000)
    ranks = harness.start_ranks(*words, config=copy_of(name, tmp_path), num_processes=world)
    wait_for_step(ranks[0], out, 3)
    ranks[victim].signal(signal.SIGKILL)
    assert_others_end(ranks, victim, called)


@pytest.mark.parametrize("name, world, victim, called", exhaustive_but(1))
def test_an_error_in_a_stage_ends_the_others_with_its_name(
    harness, tiny_corpus, cache, tmp_path, name, world, victim, called
):
    out = tmp_path / "run"
    _, *flags = command("bert", tiny_corpus, cache, out, "--per_device_train_batch_size", 8, steps=100_000)
    words = [TESTS / "failing_stage.py", victim, 50, *flags]
    ranks = harness.start_ranks(*words, config=copy_of(name, tmp_path), num_processes=world)
    ended = assert_others_end(ranks, victim, called)
    assert "ValueError: this stage is broken" in ended.stderr
    assert ended.returncode == 1 and 0 < max(losses(out)) < 20


def assert_others_end(ranks, victim, called):
    """All end within a minute, those that have lost a process with its name. Returns: Result of the lost one."""
    results = wait_all(ranks, timeout=60)
    for rank, result in enumerate(results):
        if rank != victim:
            result.check(1)
            lost = f"error: process {rank} of {len(ranks)}: {called} has ended or cannot be reached"
            assert lost in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    return results[victim]


@pytest.mark.parametrize("name", ["pipeline_2bw", "pipeline_1f1b"])
def test_throughput_of_stages_is_measured(harness, tiny_corpus, cache, tmp_path, name):
    out = tmp_path / "run"
    words = [SCRIPT, *small_run(tiny_corpus, cache, out, "--num_hidden_layers", 4, "--throughput_steps", 6)[1:]]
    printed = launch(harness, words, copy_of(name, tmp_path))
    stages = json.loads((out / "stages.json").read_text())
    assert [row["stage"] for row in stages] == ["0", "1"] and len(stages[0]["step_seconds"]) == 5
    for row in stages:
        busy = row["forward_seconds"] + row["backward_seconds"] + row["update_seconds"]
        assert row["bubble_share"] == pytest.approx(1 - busy / row["seconds"]) and 0 < row["bubble_share"] < 1
        waiting = row["idle_seconds"] + row["communication_seconds"]
        assert waiting == pytest.approx(row["seconds"] - busy) and row["communication_seconds"] > 0
        assert row["peak_memory_bytes"] > 1e8 and all(seconds > 0 for seconds in row["step_seconds"])
        assert all(earlier["end"] <= later["begin"] for earlier, later in itertools.pairwise(row["last_passes"]))
    assert results(out)["bubble_share"] == pytest.approx(sum(row["bubble_share"] for row in stages) / 2)
    figures = {"tokens_per_second", "samples_per_second", "train_loss", "peak_memory_bytes"}
    assert figures <= results(out).keys()
    assert "waiting or communicating" in printed and Image.open(out / "timeline.png").size[0] > 1000
    order = [(one["kind"], one["micro_batch"]) for one in stages[0]["last_passes"]]
    of_next = order.index(("forward", order[-1][1] - 3))  # the first of the last batch's four micro-batches
    assert (order.index(("backward", order[-1][1] - 4)) > of_next) == (name == "pipeline_2bw"), "no flush is seen"


REFUSED = [
    ("schedule=1f1b stages=2 micro_batches=3", [], "cannot be cut into the 3 micro-batches"),
    ("schedule=1f1b stages=4 micro_batches=2", [], "schedule=1f1b with 4 stages needs as many micro-batches"),
    ("schedule=2bw stages=4 micro_batches=2", [], "stages on 4 processes needs 4 or more micro-batches"),
    ("schedule=interleaved stages=3 micro_batches=4", [], "stages=3 does not go up in that"),
    ("schedule=interleaved stages=4 micro_batches=3", [], "micro_batches=3 is no multiple of 2"),
    ("schedule=gpipe stages=5 micro_batches=4", [], "4 layers are not enough for 5 stages"),
    ("schedule=1f1b stages=2 micro_batches=4", ["--optimizer_type", "prodigy"], "looks at all tensors at once"),
    (
        "schedule=zigzag stages=2 micro_batches=4",
        [],
        "schedule=gpipe|1f1b|interleaved|2bw|2bw_corrected stages=N micro_batches=N",
    ),
]


@pytest.mark.parametrize("options, flags, says", REFUSED)
def test_what_cannot_be_done_is_refused_before_the_launch(harness, tiny_corpus, cache, out, options, flags, says):
    world = int(options.split("stages=")[1].split()[0]) // (2 if "interleaved" in options else 1)
    environment = {"ROLE_NAME": f"pipeline {options}", "WORLD_SIZE": world}
    words = [*command("bert", tiny_corpus, cache, out, *flags), "--check_arguments"]
    result = harness.run(*words, env=environment).check(2)
    assert says in result.stderr and result.stderr.count("error: ") == 1 and not out.exists()


def test_the_number_of_processes_must_fit(harness, tiny_corpus, cache, out):
    environment = {"ROLE_NAME": "pipeline schedule=1f1b stages=2 micro_batches=4", "WORLD_SIZE": 3, "RANK": 0}
    result = harness.run(*command("bert", tiny_corpus, cache, out), env=environment).check(2)
    assert "stages for 2 processes and num_processes is 3" in result.stderr


@pytest.fixture(scope="module")
def rte(tmp_path_factory):
    """A folder in RTE's layout, whose classes can be told apart."""
    folder = tmp_path_factory.mktemp("RTE")
    for name, number in (("train", 64), ("dev", 24)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(number):
            same = index % 3 == 0
            second = "the file is open" if same else "a list of names " + "and so on " * (index % 5)
            lines.append(f"{index}\tthe file is open\t{second}\t{'' if same else 'not_'}entailment")
        (folder / f"{name}.tsv").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_fine_tuning_takes_stages_and_goes_through_them(harness, partitioned, rte, tmp_path, shows):
    """From a checkpoint in parts; batches differ in length."""
    shows("pipeline_1f1b", "run_glue.py", 2)
    outs = [tmp_path / "one", tmp_path / "two"]
    one, two = (
        ["run_glue.py", "--model_name_or_path", latest_checkpoint(partitioned), "--task_name", "rte", "--do_train"]
        + ["--data_dir", rte, "--output_dir", out, "--fp32", "--do_eval", "--logging_steps", 1, "--max_train_steps", 8]
        + ["--learning_rate", 1e-3, "--per_device_train_batch_size", 8]
        for out in outs
    )
    harness.run(*one).check()
    launch(harness, two, copy_of("pipeline_1f1b", tmp_path))
    assert losses(outs[1]) == pytest.approx(losses(outs[0]), abs=1e-5)
    mine, theirs = (results(out) for out in (outs[1], outs[0]))
    assert mine["eval_accuracy"] == theirs["eval_accuracy"]
    saved, expected = weights(outs[1]), weights(outs[0])
    assert saved.keys() == expected.keys()
    assert max(float((saved[key] - expected[key]).abs().max()) for key in saved) < 1e-5


def test_fine_tuning_refuses_a_delay(harness, partitioned, rte, out):
    words = ["run_glue.py", "--model_name_or_path", partitioned, "--task_name", "rte", "--data_dir", rte]
    environment = {"ROLE_NAME": "pipeline schedule=2bw stages=2 micro_batches=4", "WORLD_SIZE": 2, "RANK": 0}
    result = harness.run(*words, "--output_dir", out, "--do_train", env=environment).check(2)
    assert "choose accelerate_configs/pipeline_1f1b.yaml" in result.stderr and not out.exists()
