"""Several machines: two network namespaces with a cable between them; what they compute, and what ends when one fails.

Also what torchrun's restart continues from.
"""

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_launch import wait_until_gone

from common.checkpoint import complete_checkpoints
from harness import REPOSITORY, Machine, free_port, wait_all
from pretraining import assert_same_run, fp32_copy, losses, results, training_rows, wait_for_step, weights
from strategies import SCRIPTS, command
from stub_shell import Shell, executable, flag

ADDRESSES = "10.77.0.1", "10.77.0.2"
INTERFACE = "cable"
CONFIGS = {"multi_node": ("data parallel (DDP)", 1.0), "multi_node_zero": ("DeepSpeed ZeRO-2", 0.5)}
ENVIRONMENT = {"FRUGAL_VENV": str(Path(sys.executable).parent.parent)}


@pytest.fixture(scope="module")
def machines():
    """Two machines that reach each other and nothing else."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("two network namespaces need root and the command ip")
    found = [Machine(f"frugal-{os.getpid()}-{n}", address, INTERFACE) for n, address in enumerate(ADDRESSES)]
    (a, _, _), (b, _, _) = found
    steps = [
        f"netns add {a}",
        f"netns add {b}",
        f"link add {INTERFACE} netns {a} type veth peer {INTERFACE} netns {b}",
    ]
    for name, address, _ in found:
        steps += [f"-n {name} address add {address}/24 dev {INTERFACE}"]
        steps += [f"-n {name} link set {device} up" for device in ("lo", INTERFACE)]
    try:
        for step in steps:
            done = subprocess.run(["ip", *step.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        yield found
    finally:
        for machine in found:
            subprocess.run(["ip", "netns", "delete", machine.namespace], capture_output=True)


@pytest.fixture(scope="module")
def on_one_process(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a model's name giving the folder of its run on one process."""

    def run(model):
        out = tmp_path_factory.mktemp("single") / "run"
        harness.run(*command(model, tiny_corpus, cache, out, 1)).check()
        return out

    return functools.cache(run)


@pytest.fixture(scope="module")
def single(on_one_process):
    """The folder of the run of BERT on one process."""
    return on_one_process("bert")


def assert_equal(out, one):
    """The run computed what the run on one process did, to 1e-5. Returns: the largest difference of losses."""
    apart = max(abs(losses(out)[step] - losses(one)[step]) for step in losses(one))
    assert losses(out).keys() == losses(one).keys() and apart < 1e-5
    assert results(out)["eval_loss"] == pytest.approx(results(one)["eval_loss"], abs=1e-5)
    saved, expected = weights(out), weights(one)
    assert saved.keys() == expected.keys()
    assert max(float((saved[key] - expected[key]).abs().max()) for key in saved) < 1e-5
    return apart


def lost(process, other):
    """What a process says when another one has ended."""
    return (
        f"error: process {process} of 2: process {other} has ended or cannot be reached; the same command with "
        "--resume_from_checkpoint latest continues from the last checkpoint"
    )


@pytest.mark.parametrize("model", ["bert", pytest.param("opt", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_machines_equal_one_process(
    harness, machines, on_one_process, tiny_corpus, cache, tmp_path, shows, name, model
):
    shows(name, SCRIPTS[model], 2)
    (strategy, share), single = CONFIGS[name], on_one_process(model)
    out, config = tmp_path / "run", fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    words = command(model, tiny_corpus, cache, out, 2)
    ranks = harness.launch(*words, config=config, num_processes=None, machines=machines)
    other = ranks[1].check().stdout.splitlines()
    if name == "multi_node_zero":  # in a fresh environment each machine says that it builds
        other = [line for line in other if not line.startswith("building DeepSpeed's deepspeed_shm_comm")]
    assert len(ranks) == 2 and not other
    assert f"strategy: {strategy}, 2 process(es), fp32" in ranks[0].check().stdout
    print(f"{name}: losses differ by at most {assert_equal(out, single):.1e}")
    mine, theirs = results(out)["optimizer_bytes_per_rank"], results(single)["optimizer_bytes_per_rank"]
    assert mine == pytest.approx(share * theirs, rel=0.02)


@pytest.mark.parametrize(
    "name, victim",
    [("multi_node", 1), ("multi_node", 0), pytest.param("multi_node_zero", 1, marks=pytest.mark.exhaustive)],
)
def test_a_killed_process_ends_the_other_with_its_number(
    harness, machines, tiny_corpus, cache, tmp_path, name, victim
):
    out, config = tmp_path / "run", fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, out, 2, "--max_train_steps", 100_000)
    ranks = harness.start_ranks(*words, config=config, num_processes=None, machines=machines)
    wait_for_step(ranks[0], out, 3)
    ranks[victim].signal(signal.SIGKILL)
    ended = [rank.wait(timeout=60) for rank in ranks]
    assert ended[victim].returncode == -signal.SIGKILL
    survivor = ended[1 - victim].check(1)
    assert survivor.stderr.splitlines()[-1] == lost(1 - victim, victim) and "Traceback" not in survivor.stderr


def test_processes_that_share_a_machine_end_together(harness, tiny_corpus, cache, tmp_path):
    """DeepSpeed's processes on one machine wait for each other in shared memory, which no death ends."""
    out, config = tmp_path / "run", fp32_copy("accelerate_configs/zero2.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, out, 2, "--max_train_steps", 100_000)
    ranks = harness.start_ranks(*words, config=config, num_processes=None)
    wait_for_step(ranks[0], out, 3)
    ranks[1].signal(signal.SIGKILL)
    survivor = ranks[0].wait(timeout=60).check(1)
    assert survivor.stderr.splitlines()[-1] == lost(0, 1) and "Traceback" not in survivor.stderr


@pytest.mark.exhaustive
def test_a_cable_that_is_pulled_ends_both(harness, machines, tiny_corpus, cache, tmp_path):
    out, config = tmp_path / "run", fp32_copy("accelerate_configs/multi_node.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, out, 2, "--max_train_steps", 100_000)
    ranks = harness.start_ranks(*words, config=config, num_processes=None, machines=machines)
    wait_for_step(ranks[0], out, 3)
    link = ["ip", "-n", machines[1].namespace, "link", "set", INTERFACE]
    subprocess.run([*link, "down"], check=True)
    try:
        ended = wait_all(ranks, timeout=60)
    finally:
        subprocess.run([*link, "up"], check=True)
    for number, rank in enumerate(ended):
        assert rank.check(1).stderr.splitlines()[-1] == lost(number, 1 - number)


def start_on(harness, machines, node, words, **env):
    """Start a command on a machine, its number in place of {node}. Returns: Running."""
    words = [str(word).replace("{node}", str(node)) for word in words]
    return harness.start_command("ip", "netns", "exec", machines[node].namespace, *words, env=ENVIRONMENT | env)


def workers(out):
    """The processes that torchrun has started for a run, by their rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            words, parent = process.cmdline(), process.parent()
            if str(out) in words and parent is not None and str(out) in parent.cmdline():
                found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue
    return found


@pytest.mark.exhaustive
def test_the_script_on_two_machines_ends_when_a_process_is_killed(harness, machines, tiny_corpus, cache, tmp_path):
    out, config = tmp_path / "run", fp32_copy("accelerate_configs/multi_node.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, out, 2, "--max_train_steps", 100_000)
    words, port = ["bash", "scripts/run_multi_node.sh", "{node}", 2, ADDRESSES[0], 1, config, *words], free_port()
    both = [start_on(harness, machines, node, words, MASTER_PORT=port) for node in (0, 1)]
    wait_for_step(both[0], out, 3, timeout=240)
    workers(out)[1].kill()
    ended = [launcher.wait(timeout=60) for launcher in both]
    assert all(launcher.returncode != 0 for launcher in ended)
    assert lost(0, 1) in ended[0].stderr and "rank      : 1" in ended[1].stderr
    wait_until_gone(out, seconds=10)


@pytest.mark.exhaustive
def test_a_slurm_job_on_two_machines_equals_one_process(harness, machines, single, tiny_corpus, cache, tmp_path):
    """The real batch file; srun and scontrol are stand-ins that know the two machines."""
    out, config = tmp_path / "run", fp32_copy("accelerate_configs/multi_node.yaml", tmp_path)
    tools, lines = tmp_path / "bin", ["#!/bin/bash", "[[ $1 == --kill-on-bad-exit=1 ]] && shift"]
    tools.mkdir()
    for node, machine in enumerate(machines):
        lines.append(f'SLURM_NODEID={node} ip netns exec {machine.namespace} "$@" & all+=($!)')
    executable(tools / "srun", "\n".join([*lines, 'wait "${all[0]}" && wait "${all[1]}"', ""]))
    executable(tools / "scontrol", f"#!/bin/bash\necho {ADDRESSES[0]}\nsleep 0.5\necho {ADDRESSES[1]}\n")
    job = {"SLURM_SUBMIT_DIR": REPOSITORY, "SLURM_JOB_NODELIST": "both", "SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 2}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    words = [REPOSITORY / "scripts/run_slurm.sbatch", 1, config, *command("bert", tiny_corpus, cache, out, 2)]
    ended = harness.command("bash", *words, env=ENVIRONMENT | job | {"PATH": path}, cwd=tmp_path.parent).check()
    assert f"machine 1 of 2: talks to {ADDRESSES[0]} over {INTERFACE}" in ended.stdout
    assert_equal(out, single)


RESTART_FLAGS = ["--checkpointing_steps", 3]


RESTART = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}


@pytest.fixture
def killed(harness, tiny_corpus, cache, tmp_path):
    """A run on one process that was killed after step 7, and its command line."""
    out = tmp_path / "killed"
    words = command("bert", tiny_corpus, cache, out, 1, *RESTART_FLAGS, "--overwrite_output_dir", dropout=0.1)
    process = harness.start(*words, env=RESTART | {"TORCHELASTIC_RESTART_COUNT": "0"}, pause_at=7)
    wait_for_step(process, out, 7)
    process.signal(signal.SIGKILL)
    process.wait()
    return out, words


def test_a_restart_continues_from_the_last_checkpoint_by_itself(harness, killed, tiny_corpus, cache, tmp_path):
    out, words = killed
    last, whole = complete_checkpoints(out)[0], tmp_path / "whole"
    harness.run(*command("bert", tiny_corpus, cache, whole, 1, *RESTART_FLAGS, dropout=0.1)).check()
    result = harness.run(*words, env=RESTART).check()
    assert "restart 1 of 1: --resume_from_checkpoint latest" in result.stdout
    assert f"continuing from {last}:" in result.stdout
    assert_same_run(whole, out)


def kill_when_at(step, out, launcher, victim):
    """Kill the process of a rank once a run of torchrun's has logged a step; torchrun starts all again."""
    wait_for_step(launcher, out, step, timeout=240)
    workers(out)[victim].kill()


@pytest.mark.parametrize("name", ["ddp", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("zero2", "fsdp"))])
def test_torchrun_starts_both_processes_again(harness, tiny_corpus, cache, tmp_path, name):
    out, whole, config = tmp_path / "run", tmp_path / "whole", fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    words = command("bert", tiny_corpus, cache, out, 2, *RESTART_FLAGS, dropout=0.1)
    launcher = harness.start_accelerate_launch("--max_restarts", 1, *words, config=config)
    kill_when_at(7, out, launcher, 1)
    uninterrupted = command("bert", tiny_corpus, cache, whole, 2, *RESTART_FLAGS, dropout=0.1)
    for rank in harness.launch(*uninterrupted, config=config):
        rank.check()
    assert "restart 1 of 1: --resume_from_checkpoint latest" in launcher.wait().check().stdout
    assert_same_run(whole, out)


@pytest.mark.exhaustive
def test_the_script_on_two_machines_starts_both_again(harness, machines, tiny_corpus, cache, tmp_path):
    out, whole, config = (
        tmp_path / "run",
        tmp_path / "whole",
        fp32_copy("accelerate_configs/multi_node.yaml", tmp_path),
    )
    words = command("bert", tiny_corpus, cache, out, 2, *RESTART_FLAGS, dropout=0.1)
    words, port = ["bash", "scripts/run_multi_node.sh", "{node}", 2, ADDRESSES[0], 1, config, *words], free_port()
    both = [start_on(harness, machines, node, words, MASTER_PORT=port, MAX_RESTARTS=1) for node in (0, 1)]
    kill_when_at(7, out, both[0], 1)
    uninterrupted = command("bert", tiny_corpus, cache, whole, 2, *RESTART_FLAGS, dropout=0.1)
    for rank in harness.launch(*uninterrupted, config=config, num_processes=None, machines=machines):
        rank.check()
    for launcher in both:
        launcher.wait().check()
    assert_same_run(whole, out)


def test_a_restart_does_not_continue_another_run(harness, killed):
    """A folder that was there before the launcher, which the first start has refused."""
    out, words = killed
    os.utime(out / "args.json", (0, 0))
    words.remove("--overwrite_output_dir")
    rows = training_rows(out)
    assert f"{out} holds another run" in harness.run(*words, env=RESTART).check(2).stderr
    assert training_rows(out) == rows


def test_restarts_need_an_output_folder(harness, tiny_corpus, cache, tmp_path):
    words = command("bert", tiny_corpus, cache, tmp_path / "run", 1)
    at = words.index("--output_dir")
    result = harness.run(*words[:at], *words[at + 2 :], env=RESTART).check(2)
    assert "--max_restarts needs the script's --output_dir" in result.stderr


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path, "run_multi_node.sh")
    for name in ("run_pretraining.py", "run_clm.py"):
        (shell.repository / name).touch()
    shell.machine(getent="10.1.2.3 STREAM here", ip="2: eth7    inet 10.1.2.3/24")
    return shell


def test_the_script_hands_on_what_the_launcher_needs(shell):
    words = ["--job_name", "two  words"]
    check, launch = shell.run("1", "3", "node0", "4", "multi_node_zero", "run_clm.py", *words, MASTER_PORT="1234")
    script = str(shell.repository / "run_clm.py")
    assert check["argv"] == [script, *words, "--check_arguments"] and check["env"]["WORLD_SIZE"] == "12"
    assert check["env"]["LOCAL_WORLD_SIZE"] == "4"
    assert launch["argv"][-3:] == [script, *words]
    assert flag(launch, "--config_file") == str(shell.repository / "accelerate_configs" / "multi_node_zero.yaml")
    flags = {"machine_rank": 1, "num_machines": 3, "num_processes": 12, "main_process_ip": "node0"}
    flags |= {"main_process_port": 1234, "rdzv_backend": "static", "deepspeed_multinode_launcher": "standard"}
    flags |= {"max_restarts": 0}
    assert {name: flag(launch, f"--{name}") for name in flags} == {name: str(flags[name]) for name in flags}
    assert "--same_network" in launch["argv"] and launch["env"]["OMP_NUM_THREADS"] == "1"
    assert launch["env"]["GLOO_SOCKET_IFNAME"] == launch["env"]["NCCL_SOCKET_IFNAME"] == "eth7"
    assert shlex.split(launch["env"]["FRUGAL_COMMAND"])[1:3] == ["scripts/run_multi_node.sh", "1"]


def test_the_users_network_stays(shell):
    launch = shell.run("0", "2", "node0", "1", NCCL_SOCKET_IFNAME="ib0")[1]
    assert launch["env"]["NCCL_SOCKET_IFNAME"] == "ib0" and "GLOO_SOCKET_IFNAME" not in launch["env"]
    assert launch["argv"][-1] == str(shell.repository / "run_pretraining.py")


@pytest.mark.parametrize(
    "words, fault",
    [
        (["0", "2", "node0"], "3 arguments"),
        (["0", "2", "node0", "1", "ddp", "run_clm.py", "more"], "7 arguments"),
        (["2", "2", "node0", "1"], "node-rank '2': give a number from 0 to 1"),
        (["-1", "2", "node0", "1"], "node-rank '-1'"),
        (["0", "two", "node0", "1"], "nodes 'two'"),
        (["0", "2", "", "1"], "master-address ''"),
        (["0", "2", "node0", "0"], "processes-per-node '0'"),
        (["0", "2", "node0", "1", "no_such"], "accelerate config 'no_such' not found"),
        (["0", "2", "node0", "1", "ddp", "train.py"], "script 'train.py': give one of run_clm.py run_pretraining.py"),
    ],
)
def test_bad_arguments_of_the_script(shell, words, fault):
    assert f"error: {fault}" in shell.fail(*words)


def test_a_name_that_nobody_knows_and_too_few_gpus(shell):
    shell.machine(getent="")
    assert "this machine does not know that name" in shell.fail("0", "2", "nod0", "1")
    shell.machine(gpus="GPU 0: x")
    assert "processes-per-node 2: only 1 GPUs are visible" in shell.fail("0", "2", "node0", "2")
    assert "MASTER_PORT '70000'" in shell.fail("0", "2", "node0", "1", MASTER_PORT="70000")


def test_a_batch_file_without_arguments_is_refused(harness):
    assert "error: give the number of processes" in harness.command("bash", "scripts/run_slurm.sbatch").check(2).stderr
