"""What run_clm.sh and run_clm_synthetic.sh make of their arguments and of the machine: copies that start a stub."""

import shlex

import pytest

from stub_shell import Shell, executable, flag

OPT_125M, WIKITEXT = "facebook/opt-125m", "Salesforce/wikitext"
GPU_MEMORY = """#!/bin/sh
for word; do
    case $word in
        -L) printf 'GPU 0: A\\nGPU 1: B\\nGPU 2: C\\n' && exit ;;
        --id=1,2) printf '81559\\n46068\\n' && exit ;;
    esac
done
printf '12288\\n81559\\n46068\\n'
"""


@pytest.fixture(params=["run_clm.sh", "run_clm_synthetic.sh"])
def either(tmp_path, request):
    return Shell(tmp_path, request.param)


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path, "run_clm.sh")


@pytest.fixture
def synthetic(tmp_path):
    return Shell(tmp_path, "run_clm_synthetic.sh")


def outcome(shell, *words, **env):
    """Returns: stdout's lines, the check and the launch, of a run that succeeds."""
    process = shell.start(*words, **env)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stderr == "", stderr
    check, launch = [call for call in shell.started() if "common.data.hub" not in call["argv"]]
    script = str(shell.repository / "run_clm.py")
    given = launch["argv"][launch["argv"].index(script) :]
    assert check["argv"] == [*given, "--check_arguments"]
    return [line for line in stdout.splitlines() if "bf16" not in line], check, launch


def flags(launch):
    """The words after the script's name."""
    argv = launch["argv"]
    return argv[[word.endswith("run_clm.py") for word in argv].index(True) + 1 :]


def said(lines, topic):
    """The one line about a topic."""
    (line,) = [line for line in lines if line.startswith(f"{topic}: ")]
    return line


def test_the_original_arguments(synthetic):
    lines, check, launch = outcome(synthetic, "16", "0", "125m", "4")
    words = ["--per_device_train_batch_size", "16", "--mem_cap", "0", "--block_size", "128"]
    assert flags(launch) == [*words, "--model_type", "opt", "--model_size", "125m", "--synthetic_data"]
    assert flag(launch, "--config_file") == str(synthetic.repository / "accelerate_configs" / "cpu.yaml")
    assert flag(launch, "--num_processes") == "4" == check["env"]["WORLD_SIZE"] == check["env"]["LOCAL_WORLD_SIZE"]
    assert check["env"]["ROLE_NAME"] == "cpu" and launch["env"]["OMP_NUM_THREADS"] == "1"
    assert len(lines) == 1 and "128 tokens, as this runs on a CPU" in said(lines, "block size")
    assert launch["env"]["FRUGAL_COMMAND"] == "bash scripts/run_clm_synthetic.sh 16 0 125m 4"


def test_the_defaults(either):
    lines, check, launch = outcome(either)
    assert flag(launch, "--per_device_train_batch_size") == "16" and flag(launch, "--mem_cap") == "0"
    assert flag(launch, "--num_processes") == "1" == check["env"]["WORLD_SIZE"]
    assert flag(launch, "--model_size") == "125m" and "OPT-125m" in said(lines, "model")
    assert "--total_training_time" not in flags(launch)


def test_the_users_flags_go_last_and_whole(either):
    extra = ["--train_file", "my texts/*.txt", "--learning_rate", "1e-4", "--model_size", "350m"]
    _, _, launch = outcome(either, "8", "7.5", "125m", *extra)
    assert flags(launch)[-len(extra) :] == extra and flag(launch, "--mem_cap") == "7.5"
    assert shlex.split(launch["env"]["FRUGAL_COMMAND"])[2:] == ["8", "7.5", "125m", *extra]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("350m", ["--model_type", "opt", "--model_size", "350m"]),
        ("6.7", ["--model_type", "opt", "--model_size", "6.7b"]),
        ("6.7B", ["--model_type", "opt", "--model_size", "6.7b"]),
        ("175b", ["--model_type", "opt", "--model_size", "175b"]),
        ("99b", ["--model_type", "opt", "--model_size", "99b"]),  # run_clm.py lists the known ones
        ("runs/one", ["--model_name_or_path", "runs/one"]),
        ("./125m", ["--model_name_or_path", "./125m"]),
        ("..", ["--model_name_or_path", ".."]),
        ("distilgpt2", ["--model_name_or_path", "distilgpt2"]),
    ],
)
def test_models(either, model, expected):
    _, _, launch = outcome(either, "2", "0", model, "--block_size", "64")
    words = [word for word in flags(launch) if word != "--synthetic_data"]
    assert words == ["--per_device_train_batch_size", "2", "--mem_cap", "0", *expected, "--block_size", "64"]


def test_a_plan_is_printed_once(synthetic):
    assert synthetic.start("2", "0", "175b", "8", "--dry_run").wait(timeout=60) == 0
    (check,) = [call for call in synthetic.started() if "common.data.hub" not in call["argv"]]
    assert check["argv"][-2:] == ["--dry_run", "--check_arguments"]


@pytest.mark.parametrize("name", ["--model_name_or_path", "--config_name", "--model_type", "--model_size"])
def test_a_model_named_by_a_flag_is_the_only_one(either, name):
    for words in ([name, "x"], [f"{name}=x"]):
        lines, _, launch = outcome(either, "2", *words)
        assert not [line for line in lines if line.startswith("model")]
        assert sum(word.startswith(("--model", "--config_name")) for word in flags(launch)) == 1


def test_weights_come_from_the_hub_where_it_can_be_had(shell):
    lines, _, launch = outcome(shell, "2", "0", "125m", STUB_HUB=OPT_125M)
    assert flag(launch, "--model_name_or_path") == OPT_125M and "--model_size" not in flags(launch)
    assert said(lines, "weights") == f"weights: {OPT_125M}"
    lines, _, launch = outcome(shell, "2", "0", "125m")
    assert flag(launch, "--model_size") == "125m" and "random" in said(lines, "weights")
    asked = [call for call in shell.started() if "common.data.hub" in call["argv"]]
    assert [call["argv"][2:] for call in asked] == [[OPT_125M], [WIKITEXT, "wikitext-2-raw-v1"]]
    assert asked[0]["env"]["PYTHONPATH"].split(":")[0] == str(shell.repository)
    lines, _, launch = outcome(shell, "2", "0", "175b", STUB_HUB="facebook/opt-175b")  # is not there
    assert flag(launch, "--model_size") == "175b" and "random" in said(lines, "weights")
    assert "weights" not in "".join(outcome(shell, "2", "0", "runs/one")[0])


def test_data_comes_from_the_hub_where_it_can_be_had(shell):
    lines, _, launch = outcome(shell, "2", "0", "125m", STUB_HUB=WIKITEXT)
    assert flag(launch, "--dataset_name") == WIKITEXT
    assert flag(launch, "--dataset_config_name") == "wikitext-2-raw-v1" and "WikiText-2" in said(lines, "data")
    lines, _, launch = outcome(shell, "2", "0", "125m")
    assert "--dataset_name" not in flags(launch) and "documentation" in said(lines, "data")
    for words in (["--train_file", "a.txt"], ["--dataset_path=a"], ["--dataset_name", "b/a"], ["--synthetic_data"]):
        lines, _, launch = outcome(shell, "2", "0", "125m", *words, STUB_HUB=WIKITEXT)
        assert WIKITEXT not in flags(launch) and not [line for line in lines if line.startswith("data")]


def test_the_synthetic_script_asks_nobody(synthetic):
    outcome(synthetic, STUB_HUB=f"{OPT_125M} {WIKITEXT}")
    assert not [call for call in synthetic.started() if "common.data.hub" in call["argv"]]


@pytest.mark.parametrize(
    ("words", "config", "processes"),
    [
        ([], "single_gpu", "1"),
        (["1"], "single_gpu", "1"),
        (["3"], "ddp", "3"),
        (["3", "cpu"], "cpu", "3"),
        (["1", "ddp"], "ddp", "1"),
        (["", "ddp"], "ddp", None),
    ],
)
def test_the_config_that_fits(either, words, config, processes):
    executable(either.bin / "nvidia-smi", GPU_MEMORY)
    lines, check, launch = outcome(either, "4", "0", "125m", *words)
    assert flag(launch, "--config_file") == str(either.repository / "accelerate_configs" / f"{config}.yaml")
    assert flag(launch, "--num_processes") == processes and check["env"]["WORLD_SIZE"] == (processes or "2")
    assert flag(launch, "--block_size") == ("128" if config == "cpu" else None)
    assert any(line.startswith("block size") for line in lines) == (config == "cpu")


def test_a_users_block_size_stays_on_a_cpu(either):
    for words in (["--block_size", "256"], ["--block_size=256"]):
        lines, _, launch = outcome(either, "4", "0", "125m", *words)
        assert flags(launch).count("--block_size") == (len(words) == 2) and "128" not in flags(launch)
        assert not [line for line in lines if line.startswith("block size")]


@pytest.mark.parametrize(
    ("words", "visible", "size", "room"),
    [
        # bytes: 16 a parameter, 34 a token, layer and hidden unit; tokens: batch times 1,024
        (["1"], None, "350m", "12.9"),  # 350m: 6.2 GB; 1.3b: 22.8
        (["16"], None, "125m", "12.9"),  # 125m: 7.1 GB; 350m: 19.0
        (["1"], "1,2", "2.7b", "48.3"),  # 2.7b: 45.3 GB; 6.7b: 111.1
        (["1", "8"], "1,2", "350m", "8.0"),
        (["1", "8", "", "2"], "1,2", "350m", "8.0"),
        (["1", "1"], "1,2", "125m", "1.0"),  # none fits
    ],
)
def test_the_model_that_fits_the_gpus(synthetic, words, visible, size, room):
    executable(synthetic.bin / "nvidia-smi", GPU_MEMORY)
    lines, _, launch = outcome(synthetic, *words, CUDA_VISIBLE_DEVICES=visible)
    assert flag(launch, "--model_size") == size
    assert f"OPT-{size} " in said(lines, "model") and f"{room} GB on the smallest GPU" in said(lines, "model")


def test_a_longer_block_leaves_room_for_a_smaller_model(synthetic):
    executable(synthetic.bin / "nvidia-smi", GPU_MEMORY)
    _, _, launch = outcome(synthetic, "1", "--block_size", "16384")
    assert flag(launch, "--model_size") == "125m"


def test_a_gpu_that_says_nothing_of_its_memory(synthetic):
    synthetic.machine(gpus="GPU 0: A100")
    lines, _, launch = outcome(synthetic)
    assert flag(launch, "--model_size") == "125m" and "does not say" in said(lines, "model")


def test_help_launches_nothing(either):
    process = either.start("16", "--help")
    usage = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "mem-cap" in usage and usage.endswith("you stand in.\n")
    assert [call["argv"] for call in either.started()] == [[str(either.repository / "run_clm.py"), "--help"]]


def test_bad_input_launches_nothing(either):
    said = either.fail("4", "0", "125m", "1", "nowhere")
    assert said.count("\n") == 1 and "'nowhere'" in said
    for number in ("0", "two", "1.5"):
        said = either.fail("4", "0", "125m", number)
        assert said.count("\n") == 1 and f"gpu-num '{number}'" in said
    assert "surplus" in either.fail("4", "0", "125m", "1", "cpu", "surplus")
    assert either.fail("0", STUB_EXIT="2") == ""
    executable(either.bin / "nvidia-smi", GPU_MEMORY)
    said = either.fail("4", "0", "125m", "4")
    assert said.count("\n") == 1 and "only 3 GPUs" in said


def test_a_negative_number_reaches_the_script(either):
    _, _, launch = outcome(either, "-4", "-1", "125m", "1", "--seed", "3")
    assert flag(launch, "--per_device_train_batch_size") == "-4" and flag(launch, "--mem_cap") == "-1"
    assert flags(launch)[-2:] == ["--seed", "3"]
