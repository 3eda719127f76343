"""Every YAML computes what one process computes, holds what its strategy lets it hold, and says what it cannot do."""

import json
from functools import partial

import pytest
import strategy_table
import torch

from common.errors import UserError
from common.parallel import check_launch
from common.parallel.launch import parse_role
from harness import REPOSITORY
from pretraining import fp32_copy, losses, results, training_rows, weights
from strategies import ALONE, CASES, FIRST, IN_BF16, MODELS, SCRIPTS, launch
from strategies import command as command_of_steps

TWO_MACHINES = {"multi_node", "multi_node_zero"}  # see test_multi_node.py
GPUS_ALONE = {"fp8"}  # see test_fp8.py
# see test_pipeline_parallel.py, and test_delayed.py for the last
PIPELINES = {"pipeline_gpipe", "pipeline_1f1b", "pipeline_interleaved", "pipeline_1f1b_dp", "pipeline_2bw"}
IN_CHUNKS = {"colossalai_gemini", "colossalai_gemini_auto", "colossalai_gemini_offload"}  # see test_colossalai.py
GRID = [
    pytest.param(
        name, model, marks=() if model == "bert" or (model == "opt" and name in FIRST) else pytest.mark.exhaustive
    )
    for name, case in CASES.items()
    for model in MODELS
    if model in ("bert", "opt") or case.slices > 1
]
GRID += [pytest.param(name, "opt", marks=pytest.mark.exhaustive) for name in ALONE]
# Numbers that slicing cuts: in each of 2 layers, matrices of attention [32, 32] and of the feed-forward [64, 32] and,
# where there are any, the biases of what is cut by its outputs.
SLICED = dict.fromkeys(MODELS, 2 * (4 * 32 * 32 + 3 * 32 + 2 * 64 * 32 + 64))
SLICED["llama"] = 2 * (3 * 32 * 32 + 3 * 64 * 32)  # two heads of keys and values for four of queries
command = partial(command_of_steps, steps=10)


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


def test_every_yaml_has_its_row():
    known = CASES.keys() | ALONE | TWO_MACHINES | GPUS_ALONE | PIPELINES | IN_CHUNKS
    assert {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")} == known


@pytest.mark.parametrize("name, model", GRID)
def test_a_yaml_equals_one_process(harness, single, tiny_corpus, cache, tmp_path, shows, name, model):
    case, one, out = (CASES | ALONE)[name], single(model), tmp_path / "run"
    shows(name, SCRIPTS[model], case.ranks)
    printed = launch(harness, name, tmp_path, command(model, tiny_corpus, cache, out, case.readers))
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
    elsewhere = SLICED[model] * 4 * (1 - 1 / case.slices)  # bytes of other slices, which AdamW has two moments of
    parameters = case.parameters * (theirs["parameter_bytes_per_rank"] - elsewhere)
    optimizer = case.optimizer * (theirs["optimizer_bytes_per_rank"] - 2 * elsewhere)
    assert mine["parameter_bytes_per_rank"] == pytest.approx(parameters, rel=0.02)
    assert mine["optimizer_bytes_per_rank"] == pytest.approx(optimizer, rel=0.02)
    saved, expected = weights(out), weights(one)
    assert saved.keys() == expected.keys()
    assert max(float((saved[key] - expected[key]).abs().max()) for key in saved) < 1e-5
    _, info = MODELS[model].from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("name", ["zero2", "fsdp", "colossalai_zero2"])
def test_an_optimizer_that_needs_whole_tensors_is_refused(harness, tiny_corpus, cache, tmp_path, name):
    words = command("bert", tiny_corpus, cache, tmp_path / "run", 2, "--optimizer_type", "muon")
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    ranks = harness.launch(*words, config=config, num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "error: Muon looks at whole tensors" in ranks[0].stderr and "--optimizer_type adamw" in ranks[0].stderr
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr


REFUSED = {  # lines that a YAML may have instead of others, and what is said of them
    "zero2": [
        (
            "zero_stage: 2",
            "zero_stage: 2\n  gradient_clipping: 0.5",
            "gradient_clipping 0.5 contradicts --max_grad_norm",
        ),
        (
            "zero_stage: 2",
            "zero_stage: 2\n  gradient_accumulation_steps: 4",
            "contradicts the accumulation that follows",
        ),
        ("zero_stage: 2", "zero_stage: 0", "zero_stage 0 cuts nothing"),
        ("offload_optimizer_device: none", "offload_optimizer_device: nvme", "offloads to nvme"),
    ],
    "zero3": [("zero3_init_flag: false", "zero3_init_flag: true", "zero3_init_flag is not supported")],
    "fsdp": [
        ("fsdp_version: 2", "fsdp_version: 1", "fsdp_version must be 2"),
        ("fsdp_version: 2", "fsdp_version: 2\n  fsdp_activation_checkpointing: true", "give --gradient_checkpointing"),
        ("fsdp_version: 2", "fsdp_version: 2\n  fsdp_state_dict_type: SHARDED_STATE_DICT", "fsdp_state_dict_type"),
    ],
}


@pytest.mark.parametrize("name, line, instead, said", [(name, *row) for name in REFUSED for row in REFUSED[name]])
def test_what_a_yaml_asks_for_in_vain_is_refused(harness, tiny_corpus, cache, tmp_path, name, line, instead, said):
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    assert line in config.read_text()
    config.write_text(config.read_text().replace(line, instead))
    words = command("bert", tiny_corpus, cache, tmp_path / "run", 2)
    ranks = harness.launch(*words, config=config, num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert ranks[0].stderr.count("error: ") == 1 and said in ranks[0].stderr
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr


ZERO2, ZERO3 = (
    {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (2, 3)
)
GEMINI = {"ROLE_NAME": "colossalai plugin=gemini placement_policy=static", "ACCELERATE_MIXED_PRECISION": "bf16"}
STAGES = {"ROLE_NAME": "pipeline schedule=1f1b stages=2 micro_batches=4"}
DELAYED = {"ROLE_NAME": "pipeline schedule=2bw stages=2 micro_batches=1"}
FIND, COMPILED, AVERAGE = ["--auto_find_batch_size"], ["--torch_compile", "true"], ["--ema_decay", 0.9]
GROWING = ["--rampup_batch_size", 8, 8, 64]  # with 8 rows in a device: one micro-batch at first
BEFORE_THE_LAUNCH = [  # what the launcher sets, a model, flags, and what is said of them
    (ZERO2, "opt", ["--optimizer_type", "lamb"], "Lamb looks at whole tensors"),
    (STAGES, "opt", ["--optimizer_type", "prodigy"], "Prodigy looks at all tensors at once"),
    (GEMINI, "opt", ["--optimizer_type", "lion"], "Gemini has its own Adam, and Lion is another optimizer"),
    (GEMINI, "bert", ["--optimizer_type", "sgd"], "Gemini has its own Adam, and SGD is another optimizer"),
    (GEMINI | {"ACCELERATE_MIXED_PRECISION": "no"}, "opt", [], "Gemini trains in bf16 or fp16"),
    (ZERO2, "opt", FIND, "cannot try sizes under DeepSpeed ZeRO-2"),
    (STAGES, "bert", FIND, "cannot try sizes under a pipeline with schedule=1f1b"),
    (GEMINI, "bert", COMPILED, "--torch_compile: Colossal-AI's plugin=gemini works between the layers"),
    (ZERO3, "opt", COMPILED, "--torch_compile: DeepSpeed ZeRO-3 works between the layers"),
    (ZERO3, "bert", AVERAGE, "--ema_decay: DeepSpeed ZeRO-3 holds weights in more than one place"),
    (GEMINI, "bert", AVERAGE, "--ema_decay: Colossal-AI's plugin=gemini holds weights"),
    (DELAYED, "bert", [*AVERAGE, *GROWING], "--ema_decay: a pipeline with schedule=2bw holds weights"),
    (DELAYED, "bert", GROWING, "needs 2 or more micro-batches in a step"),
    (DELAYED, "opt", GROWING, "needs 2 or more micro-batches in a step"),
]


@pytest.mark.parametrize(("sets", "model", "flags", "said"), BEFORE_THE_LAUNCH)
def test_what_cannot_be_done_is_refused_before_the_launch(harness, tiny_corpus, cache, out, sets, model, flags, said):
    words = command(model, tiny_corpus, cache, out, 1, *flags, "--check_arguments")
    words = [word for word in words if word != "--fp32"]
    checked = harness.run(*words, env={"WORLD_SIZE": 2, "ACCELERATE_MIXED_PRECISION": "no", **sets}).check(2)
    assert said in checked.stderr and checked.stderr.count("error: ") == 1 and "Traceback" not in checked.stderr
    assert not out.exists()


NOT_IN_FP16 = [
    (STAGES, "fp16 is not supported in a pipeline"),
    ({"ACCELERATE_USE_FSDP": "true"}, "fp16 is not supported under FSDP"),
    ({"ROLE_NAME": "tensor_parallel size=2"}, "fp16 is not supported under FSDP and tensor parallelism"),
    ({"ROLE_NAME": "colossalai plugin=ddp"}, "plugin=ddp has no fp16 here"),
]


@pytest.mark.parametrize(("sets", "said"), NOT_IN_FP16)
def test_fp16_is_refused_before_the_launch(monkeypatch, sets, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"WORLD_SIZE": "2", **sets}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_launch("fp16", "none")


@pytest.mark.parametrize("size", ["²", "٢", "0", "-1", "2.0", ""])
def test_a_number_in_a_role_is_written_in_digits(size):
    with pytest.raises(UserError, match="is not understood: it is written 'tensor_parallel size=N'"):
        parse_role(f"tensor_parallel size={size}")


@pytest.mark.exhaustive
def test_an_extension_is_built_once_and_announced_once(harness, tiny_corpus, cache, tmp_path):
    env = {"TORCH_EXTENSIONS_DIR": tmp_path / "extensions"}
    words = command("bert", tiny_corpus, cache, tmp_path / "a", 2)
    config = fp32_copy("accelerate_configs/zero2.yaml", tmp_path)
    first = [rank.check().stdout for rank in harness.launch(*words, config=config, num_processes=None, env=env)]
    assert (tmp_path / "extensions" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").exists()
    assert first[0].count("building DeepSpeed's deepspeed_shm_comm") == 1 and not first[1]
    words = command("bert", tiny_corpus, cache, tmp_path / "b", 2)
    second = [rank.check().stdout for rank in harness.launch(*words, config=config, num_processes=None, env=env)]
    assert "building" not in second[0] and not second[1]


def test_a_lock_that_a_killed_build_has_left_is_named(harness, tiny_corpus, cache, tmp_path):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = fp32_copy("accelerate_configs/zero2.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, tmp_path / "run", 2)
    env = {"TORCH_EXTENSIONS_DIR": tmp_path / "extensions"}
    ranks = harness.launch(*words, config=config, num_processes=None, env=env)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert f"error: {lock}: a build that was killed has left this lock: remove it" in ranks[0].stderr


SHOWN = ("zero2", "fsdp", "colossalai_ddp")
BF16_TOLERANCE = 2e-3  # of a loss near 5.4: gradients are summed in another order, and some in bf16 (DeepSpeed)


def command_in_bf16(corpus, cache, out, readers):
    return [word for word in command("bert", corpus, cache, out, readers) if word != "--fp32"]


@pytest.fixture(scope="module")
def one_in_bf16(harness, tiny_corpus, cache, tmp_path_factory):
    """The folder of the run of BERT on one process in bf16."""
    out = tmp_path_factory.mktemp("bf16") / "run"
    harness.run(*command_in_bf16(tiny_corpus, cache, out, 1), "--bf16").check()
    return out


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHOWN else pytest.mark.exhaustive) for n in IN_BF16]
)
def test_a_yaml_in_bf16_equals_one_process_in_bf16(harness, one_in_bf16, tiny_corpus, cache, tmp_path, shows, name):
    """With the YAML as it is shipped."""
    shows(name, SCRIPTS["bert"], CASES[name].ranks)
    one, out, config = one_in_bf16, tmp_path / "run", REPOSITORY / "accelerate_configs" / f"{name}.yaml"
    words = command_in_bf16(tiny_corpus, cache, out, CASES[name].readers)
    for rank in harness.launch(*words, config=config, num_processes=None):
        rank.check()
    assert results(one)["precision"] == results(out)["precision"] == "bf16"
    apart = max(abs(losses(out)[step] - losses(one)[step]) for step in losses(one))
    print(f"{name} in bf16: losses differ by at most {apart:.1e}")
    assert apart < BF16_TOLERANCE
    assert results(out)["eval_loss"] == pytest.approx(results(one)["eval_loss"], abs=BF16_TOLERANCE)
    assert all(tensor.dtype == torch.float32 for tensor in weights(out).values())


CUT_BY_TORCH = ["hsdp", "tensor_parallel", "tensor_parallel_fsdp"]


@pytest.mark.parametrize("name", ["fsdp", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in CUT_BY_TORCH)])
def test_lamb_sees_whole_matrices(harness, tiny_corpus, cache, tmp_path, shows, name):
    shows(name, SCRIPTS["bert"], CASES[name].ranks)
    one, out = tmp_path / "one", tmp_path / "run"
    flags = ["--optimizer_type", "lamb", "--learning_rate", 1e-2]
    harness.run(*command("bert", tiny_corpus, cache, one, 1, *flags)).check()
    launch(harness, name, tmp_path, command("bert", tiny_corpus, cache, out, CASES[name].readers, *flags))
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)


def test_the_readme_shows_what_the_tests_have_shown():
    text = (REPOSITORY / "README.md").read_text()
    assert strategy_table.render() in text, "run: bash scripts/run_tests.sh all --write-strategies"
    tested = {test["strategy"] for test in json.loads(strategy_table.RESULTS.read_text()).values() if test["passed"]}
    assert {path.stem for path in strategy_table.CONFIGS.glob("*.yaml")} - tested <= {"fp8"}  # wants a GPU, or torchao
