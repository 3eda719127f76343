"""A repository whose Python is a stub that notes how it is started: what the shell scripts make of their arguments."""

import json
import os
import shutil
import subprocess
import sys

from harness import REPOSITORY, environment

STUB = f"""#!{sys.executable} -IS
import json, os, sys, time
call = {{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "pid": os.getpid()}}
with open(os.environ["STUB_LOG"], "a") as log:
    print(json.dumps(call), file=log)
if "--check_arguments" in sys.argv:
    time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
    sys.exit(int(os.environ.get("STUB_EXIT", 0)))
if "common.data.hub" in sys.argv:
    sys.exit(sys.argv[3] not in os.environ.get("STUB_HUB", "").split())
"""


def executable(path, text):
    """Write a program."""
    path.write_text(text)
    path.chmod(0o755)


class Shell:
    """A repository with a stub instead of Python, and a folder elsewhere where the user stands.

    Args:
        folder: Path; script: of scripts/, what start() starts.
    """

    def __init__(self, folder, script="run_pretraining.sh"):
        self.script = script
        self.repository, self.here, self.bin = (folder / name for name in ("a repository", "a user", "bin"))
        self.log = folder / "log"
        for path in (self.repository / "scripts", self.here, self.bin, self.repository / ".venv" / "bin"):
            path.mkdir(parents=True)
        for name in (script, "launch_env.sh", "clm_arguments.sh"):
            shutil.copy(REPOSITORY / "scripts" / name, self.repository / "scripts")
        shutil.copytree(REPOSITORY / "accelerate_configs", self.repository / "accelerate_configs")
        executable(self.repository / "scripts" / "setup.sh", "exit 0\n")
        executable(self.repository / ".venv" / "bin" / "python", STUB)
        self.machine(gpus="", nproc=8, lscpu="0,0\n0,0\n1,0\n1,0\n")

    def machine(self, **says):
        """What the tools that describe the machine print."""
        names = {"gpus": "nvidia-smi"}
        for name, text in says.items():
            executable(self.bin / names.get(name, name), f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")

    def start(self, *words, **env):
        """Start the script with these arguments. Returns: subprocess.Popen."""
        self.log.write_text("")
        absent = dict.fromkeys(("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "FRUGAL_VENV"))
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", f"../a repository/scripts/{self.script}", *words],
            cwd=self.here,
            env=environment(**{**absent, "STUB_LOG": self.log, "PATH": path, **env}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def started(self):
        """What the stub was started with, in order."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def run(self, *words, **env):
        """Returns: what the stub was started with, in order, by a run that succeeds."""
        process = self.start(*words, **env)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and stderr == "", stderr
        return self.started()

    def fail(self, *words, code=2, **env):
        """Returns: stderr of a run that ends with `code` before the launch."""
        process = self.start(*words, **env)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == code, stderr
        assert not any("accelerate.commands.launch" in call["argv"] for call in self.started())
        return stderr


def flag(call, name):
    """The word after a flag; None without the flag."""
    argv = call["argv"]
    return argv[argv.index(name) + 1] if name in argv else None
