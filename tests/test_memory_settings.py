"""A program that starts itself again with settings of memory and threads: same words, same process, once."""

import json
import platform
import subprocess
import sys

import pytest

from common.memory_settings import SETTINGS
from harness import REPOSITORY, environment

SCRIPT = """
import json, os, sys
sys.path.insert(0, {repository!r})
from common.memory_settings import SETTINGS, restart_with_memory_settings
print("started", flush=True)
restart_with_memory_settings()
settings = {{name: os.environ.get(name) for name in SETTINGS}}
print(json.dumps({{"settings": settings, "argv": sys.argv, "pid": os.getpid(), "unbuffered": sys.orig_argv[1]}}))
"""
ABSENT = dict.fromkeys([*SETTINGS, "OMP_WAIT_POLICY"])
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "a script.py"
    path.write_text(SCRIPT.format(repository=str(REPOSITORY)))
    return path


def run(*words, **env):
    """Returns: (how often the program started, what it says at the end)."""
    env = environment(**{**ABSENT, **env})
    process = subprocess.Popen([sys.executable, "-u", *words], stdout=subprocess.PIPE, text=True, env=env)
    *starts, last = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    facts = json.loads(last)
    assert facts["pid"] == process.pid and facts["unbuffered"] == "-u"
    return len(starts), facts


@glibc
def test_the_same_words_in_the_same_process(script):
    words = ["--flag", "two  words", "it's $HOME"]
    starts, facts = run(script, *words)
    assert starts == 2 and facts["settings"] == SETTINGS and facts["argv"] == [str(script), *words]


@glibc
def test_what_the_user_has_set_stays(script):
    starts, facts = run(script, MALLOC_TRIM_THRESHOLD_="1000000")
    assert starts == 2 and facts["settings"] == SETTINGS | {"MALLOC_TRIM_THRESHOLD_": "1000000"}
    assert run(script, **SETTINGS)[0] == 1
    assert run(script, OMP_WAIT_POLICY="active")[1]["settings"] == SETTINGS | {"GOMP_SPINCOUNT": None}


@pytest.mark.parametrize(
    "words",
    [["--memory_settings", "false"], ["--memory_settings=No"], ["--no_memory_settings"], ["--no-memory-settings"]],
)
def test_it_can_be_turned_off(script, words):
    starts, facts = run(script, *words)
    assert starts == 1 and facts["settings"] == dict.fromkeys(SETTINGS)


def test_a_program_that_runs_another_is_not_started_again(script, tmp_path):
    outer = tmp_path / "outer.py"
    outer.write_text(f"import runpy, sys\nsys.argv = [{str(script)!r}, 'word']\nrunpy.run_path(sys.argv[0])\n")
    assert run(outer)[0] == 1


@glibc
def test_any_command_can_be_run_with_them():
    words = [REPOSITORY / "common" / "memory_settings.py", sys.executable, "-c", "import os; print(*os.environ)"]
    done = subprocess.run([sys.executable, *words], env=environment(**ABSENT), capture_output=True, text=True)
    assert done.returncode == 0 and set(SETTINGS) <= set(done.stdout.split())
