"""What scripts/run_pretraining.sh makes of its arguments and of the machine: a copy of it that starts a stub."""

import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from stub_shell import Shell, executable, flag

CONFIG = "mixed_precision: 'fp16'   # half\nnum_processes: 3 # three\nmpirun_config:\n  role: cpu\n"


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_check_and_launch_get_the_same_words_and_the_users_folder(shell):
    extra = ["--output_dir", "my runs/one", "--job_name", "two  words", "--seed", "3"]
    check, launch = shell.run("cpu", "0.5", "small", "my texts/*.txt", *extra)
    script = str(shell.repository / "run_pretraining.py")
    words = ["--total_training_time", "0.5", "--model_size", "small", "--train_file", "my texts/*.txt", *extra]
    assert check["argv"] == [script, *words, "--check_arguments"]
    assert launch["argv"][:2] == ["-m", "accelerate.commands.launch"]
    assert launch["argv"][-len(words) - 1 :] == [script, *words]
    assert flag(launch, "--config_file") == str(shell.repository / "accelerate_configs" / "cpu.yaml")
    assert check["cwd"] == launch["cwd"] == str(shell.here)


def test_no_arguments_need_no_flags(shell):
    check, launch = shell.run()
    assert check["argv"] == [str(shell.repository / "run_pretraining.py"), "--check_arguments"]
    assert launch["argv"][-1] == str(shell.repository / "run_pretraining.py")
    assert launch["env"]["FRUGAL_COMMAND"] == "bash scripts/run_pretraining.sh"


def test_the_command_for_the_model_card_can_be_typed_again(shell):
    words = ["cpu", "1", "tiny", "my texts/*.txt", "--document_separator", "it's $HOME"]
    command = shell.run(*words)[1]["env"]["FRUGAL_COMMAND"]
    assert command.startswith("bash scripts/run_pretraining.sh cpu 1 ") and shlex.split(command)[2:] == words


@pytest.mark.parametrize(
    "data, expected",
    [
        ("texts", "--train_file"),
        ("texts.v1", "--dataset_name"),
        ("prepared", "--dataset_path"),
        ("prepared/train", "--dataset_path"),
        ("absent/corpus.jsonl.zst", "--train_file"),
        ("absent.txt", "--train_file"),
        ("./absent", "--train_file"),
        ("/absent", "--train_file"),
        ("absent/", "--train_file"),
        ("*", "--train_file"),
        ("wikimedia/wikipedia", "--dataset_name"),
        ("accelerate_configs", "--dataset_name"),  # is in the repository, not where the user stands
    ],
)
def test_data(shell, data, expected):
    (shell.here / "texts").mkdir()
    (shell.here / "prepared").mkdir()
    (shell.here / "prepared" / "train.bin").touch()
    check, launch = shell.run("cpu", "1", "tiny", data)
    assert flag(check, expected) == flag(launch, expected) == data
    given = {"--train_file", "--dataset_name", "--dataset_path"} & set(check["argv"])
    assert given == {expected}


@pytest.mark.parametrize("size", ["mini", "xsmall", "xxlarge", "1.3b", "68m"])
def test_sizes_of_every_family(shell, size):
    assert flag(shell.run("cpu", "1", size, "embedded", "--model_type", "any")[1], "--model_size") == size


def test_weights_to_continue_from(shell):
    assert flag(shell.run("cpu", "1", "runs/one")[1], "--model_name_or_path") == "runs/one"


def test_the_check_sees_what_the_launcher_will_resolve(shell):
    (shell.here / "my own.yaml").write_text(CONFIG)
    check, launch = shell.run("my own.yaml")
    names = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ROLE_NAME")
    assert [check["env"][name] for name in names] == ["3", "fp16", "cpu"]
    assert not set(names) & set(launch["env"])
    assert flag(launch, "--config_file") == "my own.yaml"
    (shell.here / "bare.yaml").write_text("distributed_type: 'NO'\n")
    check, _ = shell.run("bare.yaml")
    assert [check["env"][name] for name in names] == ["1", "no", ""]


def test_a_precision_that_the_script_overrides(shell):
    check, launch = shell.run("cpu")
    words = set(Path("/proc/cpuinfo").read_text().split())
    emulated = "flags" in words and not words & {"avx512_bf16", "amx_bf16"}
    assert check["env"]["ACCELERATE_MIXED_PRECISION"] == ("no" if emulated else "bf16")
    assert flag(launch, "--mixed_precision") == ("no" if emulated else None)
    shell.machine(gpus="GPU 0: A100")
    check, launch = shell.run("single_gpu")
    assert check["env"]["ACCELERATE_MIXED_PRECISION"] == "bf16" and flag(launch, "--mixed_precision") is None


def test_gemini_keeps_the_precision_that_it_has(shell):
    """On a processor without instructions for bf16, which is then emulated; other strategies are given fp32."""
    found = shutil.which("grep")
    executable(shell.bin / "grep", f'#!/bin/sh\ncase "$*" in *avx512_bf16*) exit 1;; esac\nexec {found} "$@"\n')
    for name, given in (("colossalai_gemini", None), ("colossalai_zero2", "no")):
        check, launch = shell.run(name)
        assert flag(launch, "--mixed_precision") == given
        assert check["env"]["ACCELERATE_MIXED_PRECISION"] == (given or "bf16")
    printed = shell.start("colossalai_gemini").communicate(timeout=60)[0]
    assert "bf16 is emulated" in printed and "fp32 instead" not in printed


@pytest.mark.parametrize(
    ("flags", "precision"),
    [(["--fp32"], "no"), (["--bf16=true"], "bf16"), (["--fp16", "True", "--seed", "1"], "fp16")],
)
def test_a_precision_that_is_asked_for_reaches_the_launcher(shell, flags, precision):
    check, launch = shell.run("cpu", *flags)
    assert check["env"]["ACCELERATE_MIXED_PRECISION"] == precision == flag(launch, "--mixed_precision")


def test_a_precision_that_is_turned_off_does_not(shell):
    shell.machine(gpus="GPU 0: A100")
    _, launch = shell.run("zero2", "--fp32", "false", "--fp16=False")
    assert flag(launch, "--mixed_precision") is None


@pytest.mark.parametrize(
    "listed, visible, config, processes",
    [
        ("No devices were found", None, "cpu", "1"),
        ("GPU 0: A100 (UUID: GPU-1)", None, "single_gpu", "1"),
        ("GPU 0: A100\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\n  MIG 1g.5gb Device 1:", None, "single_gpu", "1"),
        ("GPU 0: A100\nGPU 1: A100\nGPU 2: A100", None, "ddp", "3"),
        ("GPU 0: A100\nGPU 1: A100\nGPU 2: A100", "0,2", "ddp", "2"),
        ("GPU 0: A100\nGPU 1: A100\nGPU 2: A100", "GPU-1f", "single_gpu", "1"),
        ("GPU 0: A100\nGPU 1: A100\nGPU 2: A100", "", "cpu", "1"),
        ("GPU 0: A100\nGPU 1: A100\nGPU 2: A100", "-1", "cpu", "1"),
        ("No devices were found", "0,1", "cpu", "1"),
    ],
)
def test_the_config_that_fits_the_machine(shell, listed, visible, config, processes):
    shell.machine(gpus=listed)
    check, launch = shell.run(CUDA_VISIBLE_DEVICES=visible)
    assert flag(launch, "--config_file") == str(shell.repository / "accelerate_configs" / f"{config}.yaml")
    assert check["env"]["WORLD_SIZE"] == processes
    assert flag(launch, "--num_processes") == (processes if config == "ddp" else None)


def test_a_broken_nvidia_smi_is_no_gpu(shell):
    executable(shell.bin / "nvidia-smi", "#!/bin/sh\necho 'GPU access blocked by the driver' >&2\nexit 9\n")
    assert flag(shell.run()[1], "--config_file").endswith("/cpu.yaml")


def test_threads(shell):
    def threads(*words, **env):
        return shell.run(*words, **env)[1]["env"]["OMP_NUM_THREADS"]

    assert threads("cpu") == "2"  # lscpu: cores without hyper-threads
    assert threads("ddp") == "1"
    shell.machine(nproc=1)
    assert threads("cpu") == "1"  # nproc: what taskset leaves
    shell.machine(nproc=12, lscpu=",\n,")
    assert threads("cpu") == "12"
    shell.machine(gpus="\n".join(f"GPU {number}: A100" for number in range(4)))
    assert threads() == "3"
    assert threads(OMP_NUM_THREADS="5") == "5"


def test_the_cache_is_overwritten_once(shell):
    check, launch = shell.run("cpu", "--overwrite_cache", "--seed", "1")
    assert "false" not in check["argv"]
    assert launch["argv"][-2:] == ["--overwrite_cache", "false"]


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_launches_nothing(shell, word):
    process = shell.start("cpu", word)
    usage = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "accelerate-config" in usage and "set -e" not in usage
    assert [call["argv"] for call in shell.started()] == [[str(shell.repository / "run_pretraining.py"), "--help"]]


def test_bad_input_launches_nothing(shell):
    said = shell.fail("nowhere")
    assert said.count("\n") == 1 and "'nowhere'" in said and "cpu ddp fp8 fsdp" in said
    assert "surplus" in shell.fail("cpu", "1", "tiny", "embedded", "surplus")
    assert shell.fail("cpu", "0", STUB_EXIT="2") == ""
    shell.fail("cpu", code=1, STUB_EXIT="1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_ends_the_check_too(shell, number, whole_group):
    """From `kill`, to the script alone, and from the keyboard, to all of its process group."""
    process = shell.start("cpu", STUB_SECONDS="60")
    deadline = time.monotonic() + 30
    while not shell.log.read_text().endswith("\n") and time.monotonic() < deadline:
        time.sleep(0.01)
    (check,) = shell.started()
    if whole_group:
        os.kill(check["pid"], number)
    process.send_signal(number)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number, stderr
    with pytest.raises(ProcessLookupError):
        os.kill(check["pid"], 0)
    assert len(shell.started()) == 1
