"""scripts/setup.sh, on copies of it whose requirements need no network."""

import os
import shutil
import signal
import subprocess
import time
import zipfile

import pytest

from harness import REPOSITORY, environment


@pytest.fixture
def repository(tmp_path):
    """A repository of setup.sh and requirements.txt, which asks for a package that lies beside it."""
    root = tmp_path / "a repository"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "setup.sh", root / "scripts")
    write_wheel(root, "tiny_package")
    write_wheel(root, "demanding", "Requires-Dist: absent-package\n")
    (root / "requirements.txt").write_text("--no-index\n--find-links .\ntiny-package==1.0\n")
    (root / "requirements-colossalai.txt").write_text("")
    (root / "requirements-dev.txt").write_text("-r more.txt\n")
    (root / "more.txt").write_text("")
    return root


def write_wheel(root, name, metadata=""):
    """A package of one module, version 1.0, in a wheel."""
    information = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(root / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 7\n")
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def start(root, *args, **env):
    command = ["bash", str(root / "scripts" / "setup.sh"), *args]
    return subprocess.Popen(
        command,
        cwd="/",
        env=environment(**{"FRUGAL_VENV": None, **env}),
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def setup(root, *args, **env):
    """Returns: (exit code, stderr) of setup.sh, called from another folder."""
    process = start(root, *args, **env)
    stderr = process.communicate(timeout=120)[1]
    return process.returncode, stderr


def imports_tiny_package(venv):
    return subprocess.run([venv / "bin" / "python", "-c", "import tiny_package"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_installs_once_and_again_when_a_requirement_changes(repository, tmp_path):
    code, said = setup(repository)
    assert code == 0 and "once: about" in said and "done in" in said
    assert imports_tiny_package(repository / ".venv")
    assert setup(repository, PATH=unusable_pythons(tmp_path)) == (0, "")  # looked for no Python

    assert "done in" in setup(repository, "--dev")[1]
    assert setup(repository, "--dev") == setup(repository) == (0, "")
    (repository / "requirements-dev.txt").write_text("# nothing\n")
    assert setup(repository) == (0, "")
    assert "done in" in setup(repository, "--dev")[1]

    alone = repository / "requirements-colossalai.txt"
    alone.write_text("--no-index\n--find-links .\ndemanding==1.0\n")  # asks for a package that does not exist
    assert "done in" in setup(repository)[1]
    assert setup(repository) == (0, "")
    assert list(repository.glob(".venv/lib/*/site-packages/demanding.py"))

    (repository / "requirements.txt").write_text("--no-index\nabsent-package==1.0\n")
    code, said = setup(repository)
    assert code == 1
    assert "absent-package" in said and said.splitlines()[-1].startswith("setup: failed")
    assert (repository / ".venv.unfinished").exists()


@pytest.mark.exhaustive
def test_moved_environment_is_made_again(repository, tmp_path):
    assert setup(repository)[0] == 0
    moved = repository.rename(tmp_path / "moved")
    assert "done in" in setup(moved)[1]
    text = (moved / ".venv" / "bin" / "pip").read_text()
    assert str(moved) in text and str(repository) not in text
    assert setup(moved) == (0, "")


@pytest.mark.exhaustive
def test_environment_elsewhere(repository, tmp_path):
    assert setup(repository, FRUGAL_VENV=tmp_path / "deep" / "shared")[0] == 0
    assert imports_tiny_package(tmp_path / "deep" / "shared")
    assert not (repository / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(repository, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    code, said = setup(repository, FRUGAL_VENV=precious)
    assert code == 2 and "not a Python environment" in said
    assert [path.name for path in precious.iterdir()] == ["file"]


def test_no_usable_python_is_one_line(repository, tmp_path):
    code, said = setup(repository, PATH=unusable_pythons(tmp_path))
    assert code == 2
    assert said.count("\n") == 1 and "Python 3.11" in said


def test_unknown_argument_is_one_line(repository):
    code, said = setup(repository, "--all")
    assert code == 2
    assert said.count("\n") == 1 and "--all" in said


@pytest.mark.slow
def test_interrupted_while_pip_runs_and_another_waits(repository):
    first, held = start_and_hold_pip(repository)
    second = start(repository, "--dev")
    assert "waiting" in second.stderr.readline()
    let_the_next_pip_pass(repository)
    os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=60)[1]
    os.close(held)
    assert first.returncode == 130
    assert said.splitlines()[-1].startswith("setup: interrupted")

    said = second.communicate(timeout=120)[1]
    assert second.returncode == 0 and "done in" in said
    assert imports_tiny_package(repository / ".venv")
    assert setup(repository, "--dev") == (0, "")
    assert not (repository / ".venv.unfinished").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_pip_runs(repository, number):
    process, held = start_and_hold_pip(repository)
    let_the_next_pip_pass(repository)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    os.close(held)
    assert process.returncode == -number
    assert not list((repository / ".venv").glob("installed-*"))
    assert "done in" in setup(repository, "--dev")[1]
    assert imports_tiny_package(repository / ".venv")
    assert setup(repository, "--dev") == (0, "")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.0, 2.0])
def test_killed_while_the_environment_is_made(repository, seconds):
    process = start(repository)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    code, said = setup(repository)
    assert code == 0, said
    assert imports_tiny_package(repository / ".venv")
    assert setup(repository) == (0, "")


@pytest.mark.exhaustive
def test_the_second_of_two_finds_the_work_done(repository):
    first, held = start_and_hold_pip(repository)
    second = start(repository, "--dev")
    assert "waiting" in second.stderr.readline()
    os.close(held)
    assert "done in" in first.communicate(timeout=60)[1]
    assert second.communicate(timeout=60)[1] == ""
    assert first.returncode == second.returncode == 0
    assert imports_tiny_package(repository / ".venv")


def start_and_hold_pip(root):
    """Start setup.sh --dev and wait until pip reads one of the requirement files, which is a pipe.

    Returns:
        (process, file descriptor): pip goes on when the descriptor is closed.
    """
    (root / "more.txt").unlink()
    os.mkfifo(root / "more.txt")
    process = start(root, "--dev")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return process, os.open(root / "more.txt", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.02)
    raise AssertionError(f"pip did not start: {process.poll()}")


def let_the_next_pip_pass(root):
    """Put a plain file in the pipe's place."""
    (root / "empty").touch()
    (root / "empty").rename(root / "more.txt")


def unusable_pythons(folder):
    """Returns: a PATH on which every Python that setup.sh looks for is too old."""
    folder = folder / "old"
    folder.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
