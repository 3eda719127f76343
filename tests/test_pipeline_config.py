"""Stages of PipeDream's conf.json: uneven ones, on any processes, compute what one process computes."""

import json

import pytest
from transformers import AutoModelForMaskedLM

from common.batch_ramp import BatchRamp
from common.checkpoint import latest_checkpoint
from common.convert_checkpoint import convert
from common.errors import UserError
from common.parallel import check_launch, check_micro_batches, launched_data_ranks
from common.parallel.launch import Pipe, launched_pipe
from pipelines import LIMIT, command, copy_of, launch
from pretraining import assert_same_run, losses, results, training_rows, weights

UNEVEN = {"module_to_stage_map": [0, 0, 0, 1, 1], "stage_to_rank_map": {"0": [0], "1": [1]}}  # 3 layers and 1
ELSEWHERE = UNEVEN | {"stage_to_rank_map": {"0": [3, 1], "1": [2, 0]}}  # process 0 has the end of the second copy
DEALT = UNEVEN | {"stage_to_rank_map": {"0": [0, 1], "1": [2]}}  # micro-batches 0 and 2 go to 0, 1 and 3 to 1
DEALT_LATER = UNEVEN | {"stage_to_rank_map": {"0": [1], "1": [2, 0]}}
DEALT_THREE = {"module_to_stage_map": [0, 1, 2, 2, 2], "stage_to_rank_map": {"0": [0, 1], "1": [2], "2": [3, 4, 5, 6]}}
THREE = {"module_to_stage_map": [0, 1, 1, 2, 2], "stage_to_rank_map": {"0": [0], "1": [1], "2": [2]}}


@pytest.fixture
def conf(tmp_path):
    """Returns: function that writes a dictionary as PipeDream's README prints one, and gives the file's path."""

    def write(stages):
        path = tmp_path / "conf.json"
        path.write_text(str(stages))
        return path

    return write


@pytest.fixture(scope="module")
def single(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a model's name giving the folder of its run on one process."""
    done = {}

    def run(model):
        if model not in done:
            done[model] = tmp_path_factory.mktemp("single") / "run"
            harness.run(*command(model, tiny_corpus, cache, done[model])).check()
        return done[model]

    return run


def assert_equal(out, one):
    """Two runs are the same to 1e-5: losses, norms, validation and weights."""
    apart = max(abs(losses(out)[step] - losses(one)[step]) for step in losses(one))
    print(f"losses differ by at most {apart:.1e}")
    assert losses(out).keys() == losses(one).keys() and apart < 1e-5
    norms = [[row["grad_norm"] for row in training_rows(folder)] for folder in (out, one)]
    norms = [norm[norm[0] is None :] for norm in norms]  # without a flush there is none in the first step
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert results(out)["eval_loss"] == pytest.approx(results(one)["eval_loss"], abs=1e-5)
    saved, expected = weights(out), weights(one)
    assert saved.keys() == expected.keys()
    assert max(float((saved[key] - expected[key]).abs().max()) for key in saved) < 1e-5


@pytest.mark.parametrize(
    "name, model, stages",
    [
        ("pipeline_1f1b", "bert", UNEVEN),
        ("pipeline_gpipe", "opt", THREE),
        pytest.param("pipeline_gpipe", "bert", THREE, marks=pytest.mark.exhaustive),
        pytest.param("pipeline_1f1b", "albert", UNEVEN, marks=pytest.mark.exhaustive),
    ],
)
def test_uneven_stages_equal_one_process(harness, single, tiny_corpus, cache, conf, tmp_path, name, model, stages):
    one, out = single(model), tmp_path / "run"
    words = command(model, tiny_corpus, cache, out, "--pipeline_config", conf(stages))
    printed = launch(harness, words, copy_of(name, tmp_path), len(stages["stage_to_rank_map"]))
    assert f"{len(stages['stage_to_rank_map'])} stages of {tmp_path / 'conf.json'}, 4 micro-batches" in printed
    assert_equal(out, one)
    if model == "bert":  # process 0 has its own layers alone, with the embeddings
        layers = [f"layer.{number}." for number in range(stages["module_to_stage_map"].count(0))]
        own = [key for key in weights(out) if "embeddings" in key or any(layer in key for layer in layers)]
        assert results(out)["parameter_bytes_per_rank"] == sum(4 * weights(out)[key].numel() for key in own)


@pytest.mark.parametrize(
    "name, model, stages",
    [
        ("pipeline_1f1b", "bert", DEALT),
        ("pipeline_1f1b", "opt", DEALT_LATER),
        pytest.param("pipeline_gpipe", "bert", DEALT_LATER, marks=pytest.mark.exhaustive),
        pytest.param("pipeline_1f1b", "bert", DEALT_THREE, marks=pytest.mark.exhaustive),
        pytest.param("pipeline_gpipe", "opt", DEALT, marks=pytest.mark.exhaustive),
    ],
)
def test_dealt_micro_batches_equal_one_process(
    harness, single, tiny_corpus, cache, conf, tmp_path, name, model, stages
):
    """Stages on different numbers of processes; what is saved is merged, and continued on one process."""
    one, out, continued = single(model), tmp_path / "run", tmp_path / "continued"
    ranks = stages["stage_to_rank_map"].values()
    flags = ["--pipeline_config", conf(stages), "--checkpointing_steps", 5]
    words = command(model, tiny_corpus, cache, out, *flags)
    printed = launch(harness, words, copy_of(name, tmp_path), sum(map(len, ranks)))
    assert f", dealt out to {', '.join(str(len(one)) for one in ranks)} processes" in printed
    assert_equal(out, one)
    assert min(row["grad_norm"] for row in training_rows(out)) > LIMIT, "clipping was meant to be active"
    assert len(list((out / "step_5").glob("model-*.safetensors"))) == len(ranks)
    convert(out / "step_5", tmp_path / "merged")
    flags = ["--resume_from_checkpoint", out / "step_5"]
    harness.run(*command(model, tiny_corpus, cache, continued, *flags)).check()
    later = {step: loss for step, loss in losses(one).items() if step > 5}
    assert losses(continued) == pytest.approx(later, abs=1e-5)


@pytest.mark.parametrize("stages", [DEALT, pytest.param(DEALT_LATER, marks=pytest.mark.exhaustive)])
def test_dealt_micro_batches_without_a_flush(harness, tiny_corpus, cache, conf, tmp_path, stages):
    """What two equal stages compute, which is the definition (test_delayed.py); drained or not, and continued."""
    config = copy_of("pipeline_2bw", tmp_path)
    outs = even, out, continued = [tmp_path / name for name in ("even", "dealt", "continued")]
    words = [command("bert", tiny_corpus, cache, folder) for folder in outs]
    launch(harness, words[0], config)
    dealt = ["--pipeline_config", conf(stages)]
    launch(harness, [*words[1], *dealt, "--eval_steps", 3, "--checkpointing_steps", 5], config, 3)
    assert_equal(out, even)
    launch(harness, [*words[2], *dealt, "--resume_from_checkpoint", out / "step_5"], config, 3)
    assert training_rows(continued) == training_rows(out)[5:]
    assert all(weights(continued)[key].equal(tensor) for key, tensor in weights(out).items())


@pytest.fixture(scope="module")
def elsewhere(harness, tiny_corpus, cache, tmp_path_factory):
    """The folder of a run with checkpoints whose stages are uneven and on processes in another order."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "conf.json").write_text(str(ELSEWHERE))
    flags = ["--per_device_train_batch_size", 8, "--checkpointing_steps", 5]
    words = command("bert", tiny_corpus, cache, folder / "run", *flags, "--config_path", folder / "conf.json")
    printed = launch(harness, words, copy_of("pipeline_1f1b_dp", folder), 4)
    assert "2 copies" in printed
    return folder / "run"


def test_stages_are_on_the_processes_of_the_file(elsewhere, single):
    assert_equal(elsewhere, single("bert"))
    last = [key for key in weights(elsewhere) if "layer.3." in key or "cls" in key or "word_embeddings" in key]
    assert results(elsewhere)["parameter_bytes_per_rank"] == sum(4 * weights(elsewhere)[key].numel() for key in last)


def test_a_checkpoint_of_uneven_stages_is_merged_by_name(elsewhere, tmp_path):
    checkpoint = latest_checkpoint(elsewhere)
    places = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert {places[name][6:11] for name in places if "layer.2." in name} == {"00001"}
    assert {places[name][6:11] for name in places if "layer.3." in name} == {"00002"}
    convert(checkpoint, tmp_path / "merged")
    final, merged, read = (
        AutoModelForMaskedLM.from_pretrained(path).state_dict()
        for path in (elsewhere, tmp_path / "merged", checkpoint)
    )
    assert merged.keys() == read.keys() == final.keys()
    assert all(merged[key].equal(final[key]) and read[key].equal(final[key]) for key in final)


def test_a_run_continues_with_other_stages(harness, single, elsewhere, tiny_corpus, cache, conf, tmp_path):
    """From uneven stages to one process, and from there to other uneven ones."""
    expected, outs = losses(single("bert")), [tmp_path / "one", tmp_path / "three"]
    flags = ["--resume_from_checkpoint", elsewhere / "step_5", "--checkpointing_steps", 2]
    harness.run(*command("bert", tiny_corpus, cache, outs[0], *flags)).check()
    assert losses(outs[0]) == pytest.approx({step: loss for step, loss in expected.items() if step > 5}, abs=1e-5)
    flags = ["--resume_from_checkpoint", outs[0] / "step_8", "--pipeline_config", conf(THREE)]
    launch(harness, command("bert", tiny_corpus, cache, outs[1], *flags), copy_of("pipeline_1f1b", tmp_path), 3)
    assert losses(outs[1]) == pytest.approx({step: loss for step, loss in expected.items() if step > 8}, abs=1e-5)


def test_uneven_stages_without_a_flush(harness, tiny_corpus, cache, conf, tmp_path):
    """Bit for bit what even ones compute, which is the definition (test_delayed.py); also where they take over."""
    config = copy_of("pipeline_2bw", tmp_path)
    uneven = ["--pipeline_config", conf(UNEVEN | {"stage_to_rank_map": {"0": [1], "1": [0]}})]
    outs = even, out, continued = [tmp_path / name for name in ("even", "uneven", "continued")]
    every = ["--checkpointing_steps", 5, "--eval_steps", 3]
    words = [command("bert", tiny_corpus, cache, folder, *every) for folder in outs]
    launch(harness, words[0], config)
    launch(harness, [*words[1], *uneven], config)
    assert_same_run(out, even)
    launch(harness, [*words[2], *uneven, "--resume_from_checkpoint", even / "step_5"], config)
    assert training_rows(continued) == training_rows(even)[5:]
    assert all(weights(continued)[key].equal(tensor) for key, tensor in weights(even).items())


def test_fine_tuning_with_uneven_stages(harness, single, conf, tmp_path):
    train = tmp_path / "train.tsv"
    rows = [f"{'a list of names ' * (1 + number % 4)}\t{number % 2}" for number in range(48)]
    train.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    outs = [tmp_path / "one", tmp_path / "two"]
    one, two = (
        ["run_glue.py", "--model_name_or_path", single("bert"), "--train_file", train, "--validation_file", train]
        + ["--do_train", "--fp32", "--logging_steps", 1, "--max_train_steps", 4, "--output_dir", out]
        for out in outs
    )
    harness.run(*one).check()
    launch(harness, [*two, "--pipeline_config", conf(UNEVEN)], copy_of("pipeline_1f1b", tmp_path))
    assert losses(outs[1]) == pytest.approx(losses(outs[0]), abs=1e-5)


@pytest.fixture
def launched(monkeypatch):
    """Returns: function that sets what a launcher does: processes, and the role of its YAML."""

    def launcher(world, role="pipeline schedule=1f1b stages=2 micro_batches=4"):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("ROLE_NAME", role)

    return launcher


def of_width(*widths):
    """A conf.json of as many stages, of a module each, with so many ranks; they follow each other stage by stage."""
    ends = [sum(widths[: stage + 1]) for stage in range(len(widths))]
    ranks = {str(stage): list(range(end - widths[stage], end)) for stage, end in enumerate(ends)}
    return {"module_to_stage_map": [*range(len(widths)), len(widths) - 1], "stage_to_rank_map": ranks}


def test_pipedreams_own_ranks(launched, conf):
    """Eight stages on 64 GPUs, of which each machine has the copies of one stage: docs/migrating.md."""
    launched(64, "pipeline schedule=2bw stages=2 micro_batches=4")
    path = conf(of_width(*[8] * 8))
    pipe = launched_pipe(path)
    assert (pipe.schedule, pipe.stages, pipe.micro_batches, pipe.processes) == ("2bw", 8, 4, 8)
    assert launched_data_ranks(path) == 8 and pipe.layers(24)[7] == range(21, 24)
    assert [pipe.seat(rank) for rank in (0, 7, 8, 63)] == [(0, 0), (7, 0), (0, 1), (7, 7)]
    assert all(pipe.rank(*pipe.seat(rank)) == rank for rank in range(64))
    check_micro_batches(pipe, *BatchRamp(1024).cut(64, 8))


def test_without_a_file_stages_follow_each_other():
    pipe = Pipe("1f1b", 3, 4)
    assert [pipe.seat(rank) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(pipe.rank(*pipe.seat(rank)) == rank for rank in range(6))
    assert pipe.layers(4) == [range(1), range(1, 2), range(2, 4)]


@pytest.mark.parametrize(
    "stages, world, role, says",
    [
        (UNEVEN, 4, None, "stage_to_rank_map names 2 processes, the launcher has 4: give --num_processes 2"),
        (
            of_width(15, 1),
            16,
            None,
            r"map\['0'\] has 15 ranks, to which micro_batches=4 .* evenly: give a multiple of",
        ),
        (of_width(2, 2, 3), 7, None, r"stage_to_rank_map\['2'\] has 3 ranks, to which micro_batches=4 .* cannot be"),
        (DEALT | {"stage_to_depth_map": {"0": 2, "1": 0}}, 3, None, r"stage_to_depth_map\['0'\] 2: give 1, or leave"),
        (of_width(16), 16, None, "module_to_stage_map has one stage, .* choose accelerate_configs/ddp.yaml"),
        (UNEVEN | {"stage_to_depth_map": {"0": 2, "1": 0}}, 2, None, r"stage_to_depth_map\['0'\] 2: give 1, or leave"),
        (UNEVEN, 2, "pipeline schedule=interleaved stages=4 micro_batches=4", "gives each process one: choose"),
        (of_width(*[1] * 5), 5, None, "schedule=1f1b with 5 stages needs as many micro-batches"),
        (UNEVEN, 2, "default", "conf.json is for a YAML with stages: launch with .*pipeline_1f1b.yaml"),
        (UNEVEN, 2, "tensor_parallel size=2", "conf.json is for a YAML with stages"),
    ],
)
def test_what_cannot_be_done_is_refused(launched, conf, stages, world, role, says):
    launched(world, *filter(None, [role]))
    path = conf(stages)
    with pytest.raises(UserError, match=says) as caught:
        check_launch("no", "none", pipeline_config=path)
    assert "conf.json" in str(caught.value) or "YAML" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_warm_up_that_is_the_schedules_own(launched, conf):
    launched(2)
    assert launched_pipe(conf(UNEVEN | {"stage_to_depth_map": {"0": 1, "1": 0}})).stages == 2


@pytest.mark.parametrize(
    "stages, says",
    [
        (of_width(1, 1) | {"module_to_stage_map": [0, 0, 2]}, "module_to_stage_map[2] is stage 2: give 0 or 1"),
        (UNEVEN | {"module_to_stage_map": [0, 0, 0, 0, 1, 1]}, "5 modules before the loss, the model 4 layers"),
    ],
)
def test_a_wrong_file_ends_in_a_line_before_the_launch(harness, tiny_corpus, cache, out, conf, stages, says):
    environment = {"ROLE_NAME": "pipeline schedule=1f1b stages=2 micro_batches=4", "WORLD_SIZE": 2}
    words = [*command("bert", tiny_corpus, cache, out), "--pipeline_config", conf(stages), "--check_arguments"]
    result = harness.run(*words, env=environment).check(2)
    assert says in result.stderr and result.stderr.count("error: ") == 1 and not out.exists()
