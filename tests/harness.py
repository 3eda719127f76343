"""Run the real entry scripts as processes of their own, quickly.

`run`, `start`, `launch` and `start_ranks` fork a warm parent that has imported the scripts and their libraries
(harness_server.py), so a process costs milliseconds instead of many seconds. `command` and `accelerate_launch` start
real commands, for what a fork cannot show: what happens at import (HF_* and PYTHON* variables, what a library prints)
and at the very end of a process, the launcher itself, another hash seed (forks share their parent's, so an order that
depends on it looks fixed).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import SystemRandom
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "PYTHON", "MPL", "DS_ACCELERATOR")
LAUNCHERS_OWN = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "PYTEST_")
LAUNCHERS_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"}
GRACE_SECONDS = 30  # what torchrun gives the other ranks when one has failed


@dataclass(frozen=True)
class Result:
    """A process that ended: its exit code (negative: the signal that ended it) and what it wrote.

    beside: of the processes that belong to it those that failed, too, as (number, exit code, last lines).
    """

    name: str
    returncode: int
    stdout: str
    stderr: str
    beside: tuple = ()

    def check(self, returncode=0):
        """Fail the test, showing what the process wrote, unless it ended with this exit code; returns self."""
        if self.returncode != returncode:
            others = "".join(f"\n--- process {n} ended with {code}\n{lines}" for n, code, lines in self.beside)
            ended = f"{self.name}: exit code {self.returncode}, not {returncode}"
            pytest.fail(f"{ended}\n{tail(self.stdout, self.stderr)}{others}")
        return self


class Machine(NamedTuple):
    """A network namespace that stands for a machine; its address, and the network interface that has it."""

    namespace: str | None
    address: str
    interface: str


HERE = Machine(None, "127.0.0.1", "lo")


class Running:
    """A started process, the leader of its own process group."""

    def __init__(self, name, pid, poll, stdout_path, stderr_path, pauses=False):
        self.name, self.pid, self.stdout_path, self.stderr_path = name, pid, stdout_path, stderr_path
        self._poll, self._returncode, self._pauses = poll, None, pauses

    def poll(self):
        """Returns: the exit code, negative for a signal; None while the process runs."""
        if self._returncode is None:
            self._returncode = self._poll()
        return self._returncode

    def signal(self, number):
        """Send a signal to the process alone, as `kill` does; one that has paused goes on with it."""
        if self.poll() is None:
            os.kill(self.pid, number)
            if self._pauses and number not in (signal.SIGSTOP, signal.SIGKILL):
                os.kill(self.pid, signal.SIGCONT)

    def kill_group(self):
        """Kill the process and what it started; nothing happens where nothing is left of them."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def wait(self, timeout=300):
        """Wait for the end; after `timeout` seconds kill the whole group and fail the test.

        Returns:
            Result.
        """
        return wait_all([self], timeout)[0]

    def wait_for_output(self, text, timeout=300):
        """Wait until stdout or stderr contains `text`; the process may have ended by then. Fails like wait()."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.poll() is not None
            if text in self.stdout_path.read_text() or text in self.stderr_path.read_text():
                return
            if ended or time.monotonic() > deadline:
                self.kill_group()
                pytest.fail(f"{self.name}: {text!r} was not printed\n{self.tail()}")
            time.sleep(0.01)

    def result(self):
        """Returns: the Result of a process that ended."""
        assert self.poll() is not None, f"{self.name} still runs"
        return Result(self.name, self.poll(), self.stdout_path.read_text(), self.stderr_path.read_text())

    def tail(self):
        """Returns: the last lines that the process wrote so far, for messages."""
        return tail(self.stdout_path.read_text(), self.stderr_path.read_text())


def wait_all(processes, timeout=300):
    """Wait for processes that belong together, such as the ranks of one run.

    Like torchrun, it gives the others GRACE_SECONDS when one has failed, then kills them (returncode -9).
    When `timeout` seconds have passed it kills all of them and fails the test.

    Returns:
        One Result each, in order.
    """
    deadline, failed_at = time.monotonic() + timeout, None
    while True:
        returncodes = [process.poll() for process in processes]
        now = time.monotonic()
        if None not in returncodes:
            failed = [(number, code, processes[number].tail()) for number, code in enumerate(returncodes) if code]
            return [
                replace(process.result(), beside=tuple(row for row in failed if row[0] != number))
                for number, process in enumerate(processes)
            ]
        if failed_at is None and any(returncodes):
            failed_at = now
        late = now > deadline
        if late or (failed_at and now > failed_at + GRACE_SECONDS):
            for process in processes:
                process.kill_group()
        if late:
            tails = "\n".join(process.tail() for process in processes)
            pytest.fail(f"{processes[0].name}: still running after {timeout} s, killed\n{tails}")
        time.sleep(0.02)  # each look asks the server, which takes time from what runs


class Harness:
    """Starts processes; one object for each pytest worker, made by the `harness` fixture."""

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="frugal-tests-"))
        self._server, self._count, self._started = None, 0, []
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # tests run in a background job: children inherit it
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def close(self):
        """Kill everything that was started and remove its output files."""
        for process in self._started:
            if process.poll() is None:
                process.kill_group()
        if self._server:
            self._server.stdin.close()
            self._server.wait()
        shutil.rmtree(self._folder)

    def run(self, script, *args, env=None, cwd=REPOSITORY, timeout=300):
        """Run `python script args...` to its end in a fork of the warm parent.

        Args:
            env: variables to add to this process's environment; None removes one. OMP_NUM_THREADS is 1 by default.
            timeout: seconds; a process that takes longer is killed with its group and fails the test.
        Returns:
            Result.
        """
        return self.start(script, *args, env=env, cwd=cwd).wait(timeout)

    def start(self, script, *args, env=None, cwd=REPOSITORY, pause_at=None):
        """As run(), without waiting.

        Args:
            pause_at: a training step; having logged it the process stops, as by SIGSTOP, until Running.signal. However
                slow the test's own process is, what it then sends arrives at that step.
        Returns:
            Running.
        """
        return self._fork([script, *args], environment(forked=True, **(env or {})), cwd, pause_at=pause_at)

    def launch(self, script, *args, config="accelerate_configs/ddp.yaml", num_processes=2, timeout=300, **options):
        """Run the ranks that `accelerate launch --config_file config` would start, as forks of the warm parent.

        Returns:
            list of Result, by rank.
        """
        return wait_all(
            self.start_ranks(script, *args, config=config, num_processes=num_processes, **options), timeout
        )

    def start_ranks(
        self,
        script,
        *args,
        config="accelerate_configs/ddp.yaml",
        num_processes=2,
        env=None,
        cwd=REPOSITORY,
        machines=(HERE,),
        pause_at=None,
    ):
        """As launch(), without waiting; num_processes=None takes the YAML's number, and is that of all machines.

        pause_at is as for start(): the rank that logs pauses, and the others wait for it.

        The environment comes from accelerate's and torchrun's own code. One thing differs: rank 0 serves the
        rendezvous, not torchrun's agent, of which there is none.

        Returns:
            list of Running, by rank.
        """
        options = ["--config_file", config] + (["--num_processes", num_processes] if num_processes else [])
        port, ranks = free_port(), []
        for node, machine in enumerate(machines):
            place = ["--main_process_ip", machines[0].address, "--main_process_port", port, "--machine_rank", node]
            words = [*options, *(place if len(machines) > 1 else []), script, *args]
            planned = self.run(TESTS / "harness_launch.py", *words, env=env, cwd=cwd).check()
            plan = json.loads(planned.stdout.splitlines()[-1])
            if plan["torchrun"] is None:
                return [self._fork(plan["argv"], plan["env"], cwd, pause_at=pause_at)]
            for local_rank in range(plan["torchrun"]["local_world_size"]):
                given = torchrun_environment(local_rank, port, node, machines, **plan["torchrun"])
                ranks.append(self._fork(plan["argv"], plan["env"] | given, cwd, machine.namespace, pause_at))
        return ranks

    def command(self, *argv, env=None, cwd=REPOSITORY, timeout=300):
        """Run a real command to its end, for example ("bash", "scripts/x.sh"). Returns: Result."""
        return self.start_command(*argv, env=env, cwd=cwd).wait(timeout)

    def start_command(self, *argv, env=None, cwd=REPOSITORY):
        """As command(), without waiting. Returns: Running."""
        argv = [str(word) for word in argv]
        stdout_path, stderr_path = self._output_files()
        with open(stdout_path, "a") as stdout, open(stderr_path, "a") as stderr:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment(**(env or {})),
                cwd=cwd,
                process_group=0,
            )
        return self._remember(Running(" ".join(argv[:3]), process.pid, process.poll, stdout_path, stderr_path))

    def accelerate_launch(self, script, *args, timeout=300, **options):
        """Run the real `accelerate launch` to its end: many seconds of imports. Returns: Result of the launcher."""
        return self.start_accelerate_launch(script, *args, **options).wait(timeout)

    def start_accelerate_launch(
        self,
        script,
        *args,
        config="accelerate_configs/ddp.yaml",
        num_processes=2,
        **options,
    ):
        """As accelerate_launch(), without waiting. Returns: Running, of the launcher."""
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
        count = ["--num_processes", num_processes] if num_processes else []
        return self.start_command(*launcher, *count, script, *args, **options)

    def _fork(self, argv, env, cwd, namespace=None, pause_at=None):
        argv = [str(word) for word in argv]
        stdout_path, stderr_path = self._output_files()
        files = {"stdout": str(stdout_path), "stderr": str(stderr_path)}
        place = {"cwd": str(cwd), "namespace": namespace}
        pid = self._ask({"argv": argv, "env": env, "pause_at": pause_at, **place, **files})
        poll, pauses = lambda: self._ask({"poll": pid}), pause_at is not None
        return self._remember(Running(Path(argv[0]).name, pid, poll, stdout_path, stderr_path, pauses))

    def _ask(self, request):
        if self._server is None:
            self._start_server()
        try:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return json.loads(self._server.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            log = (self._folder / "server.log").read_text()
            raise RuntimeError(f"tests/harness_server.py has ended:\n{log}") from None

    def _start_server(self):
        with open(self._folder / "server.log", "w") as log:
            self._server = subprocess.Popen(
                [sys.executable, TESTS / "harness_server.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(
                    MPLBACKEND="Agg",
                    PYTORCH_NVML_BASED_CUDA_CHECK="1",  # which does not start CUDA: it would not survive a fork
                    JE_ARROW_MALLOC_CONF="background_thread:false",  # nor would a thread of pyarrow's
                ),
                start_new_session=True,  # Ctrl-C is for pytest, which then closes the server's stdin
            )

    def _output_files(self):
        self._count += 1
        paths = [self._folder / f"{self._count}.{kind}" for kind in ("stdout", "stderr")]
        for path in paths:
            path.touch()
        return paths

    def _remember(self, process):
        self._started.append(process)
        return process


def environment(forked=False, **changes):
    """This process's environment without what pytest or a launcher around it put there, with `changes` made.

    Args:
        forked: refuse changes that a fork of the warm parent would not see.
        changes: values by name; None removes the variable.
    """
    unseen = [name for name in changes if forked and name.startswith(READ_AT_IMPORT) and name != "PYTHONUNBUFFERED"]
    if unseen:
        raise ValueError(f"{unseen} would be read at import, which is over in the warm parent: use harness.command")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHERS_OWN) and name not in LAUNCHERS_NAMES
    }
    merged = inherited | OFFLINE | {"OMP_NUM_THREADS": "1"} | changes
    return {name: str(value) for name, value in merged.items() if value is not None}


def torchrun_environment(
    local_rank, port, node, machines, role, run_id, local_world_size, max_restarts, signals_to_handle
):
    """The variables that torchrun gives a worker; between machines, the network to use, too."""
    size, rank = str(local_world_size * len(machines)), str(node * local_world_size + local_rank)
    return {
        "RANK": rank,
        "LOCAL_RANK": str(local_rank),
        "ROLE_RANK": rank,
        "GROUP_RANK": str(node),
        "ROLE_NAME": role,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "ROLE_WORLD_SIZE": size,
        "GROUP_WORLD_SIZE": str(len(machines)),
        "MASTER_ADDR": machines[0].address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": signals_to_handle,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": "",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    } | ({"GLOO_SOCKET_IFNAME": machines[node].interface} if len(machines) > 1 else {})


def free_port():
    """Returns: a port nobody listens on, below those that systems give to outgoing connections."""
    while True:
        port = SystemRandom().randrange(15000, 32000)  # hypothesis and tests seed the other generator
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def tail(stdout, stderr, lines=30):
    """Returns: the last lines of both outputs, for messages."""
    last = ["\n".join(text.splitlines()[-lines:]) for text in (stdout, stderr)]
    return f"--- stdout ends with\n{last[0]}\n--- stderr ends with\n{last[1]}"
