"""The harness shows a script's behaviour as a fresh `python script` would."""

import json
import signal
import sys
import textwrap
import time

import psutil
import pytest

from harness import REPOSITORY, environment


@pytest.fixture
def script(tmp_path):
    """Writes a throwaway script and returns its path."""

    def write(source, name="script.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return path

    return write


@pytest.mark.parametrize(
    ("ending", "returncode"),
    [("", 0), ("sys.exit(3)", 3), ("sys.exit(-1)", 255), ("sys.exit('bad input')", 1), ("os._exit(5)", 5)],
)
def test_exit_codes_are_those_of_python(harness, script, ending, returncode):
    path = script(f"import os, sys\nprint('out', flush=True)\n{ending}")
    forked, fresh = harness.run(path), harness.command(sys.executable, path)
    assert forked.returncode == returncode
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_an_exception_is_a_traceback_and_exit_code_1(harness, script):
    path = script("def fail():\n    raise KeyError('here')\n\nfail()\n")
    forked, fresh = harness.run(path), harness.command(sys.executable, path)
    assert forked.returncode == fresh.returncode == 1
    assert "KeyError: 'here'" in forked.stderr
    assert forked.stderr == fresh.stderr


def test_threads_and_exit_handlers_end_before_the_process(harness, script):
    path = script(
        """
        import atexit, sys, threading, time
        atexit.register(print, "handler")
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
        sys.exit(4)
        """
    )
    assert harness.run(path).check(4).stdout == "thread\nhandler\n"


def test_arguments_folder_and_imports_beside_the_script(harness, script, tmp_path):
    script("VALUE = 7", name="beside.py")
    path = script(
        """
        import dataclasses, os, pickle, sys, typing
        import beside

        @dataclasses.dataclass
        class Arguments:
            hours: "float" = 1.5

        assert typing.get_type_hints(Arguments) == {"hours": float}
        assert pickle.loads(pickle.dumps(Arguments())) == Arguments()
        print(beside.VALUE, sys.argv[1:], os.getcwd(), __name__, sys.stdin.read() == "")
        """
    )
    result = harness.run(path, "--a", 1, cwd=tmp_path).check()
    assert result.stdout == f"7 ['--a', '1'] {tmp_path} __main__ True\n"


def test_environment_is_exact_and_does_not_stay(harness, script, monkeypatch):
    path = script("import json, os\nprint(json.dumps(dict(os.environ)))\nos.environ['LEFT'] = 'over'")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("NOT_WANTED", "1")
    changes = {"WANTED": 2, "NOT_WANTED": None}
    seen = json.loads(harness.run(path, env=changes).check().stdout)
    assert seen == environment(**changes)
    assert seen["WANTED"] == "2" and seen["HF_HUB_OFFLINE"] == "1"
    assert not {"RANK", "ACCELERATE_USE_CPU", "NOT_WANTED", "PYTEST_CURRENT_TEST"} & seen.keys()
    again = json.loads(harness.run(path).check().stdout)
    assert not {"WANTED", "LEFT"} & again.keys()


def test_a_change_that_a_fork_would_not_see_is_refused(harness, script):
    with pytest.raises(ValueError, match="HF_HOME"):
        harness.run(script(""), env={"HF_HOME": "/tmp"})


def test_signals_reach_the_process_and_its_handlers(harness, script):
    path = script(
        """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    running = harness.start(path)
    running.wait_for_output("ready")
    assert running.poll() is None
    running.signal(signal.SIGTERM)
    assert running.wait().returncode == 143


def test_a_pause_at_a_step_lasts_until_a_signal_which_arrives_at_that_step(harness, script, tmp_path):
    log = tmp_path / "metrics.jsonl"
    path = script(
        f"""
        from common.report import MetricsLog
        for step in range(1, 6):
            MetricsLog({str(log)!r}, is_main=True).write({{"step": step, "loss": 1.0}})
        """
    )
    running = harness.start(path, pause_at=3)
    assert wait_until(lambda: psutil.Process(running.pid).status() == psutil.STATUS_STOPPED)
    assert len(log.read_text().splitlines()) == 3 and running.poll() is None
    running.signal(signal.SIGTERM)
    assert running.wait().returncode == -signal.SIGTERM and len(log.read_text().splitlines()) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_unhandled_signal_ends_the_process_as_it_ends_python(harness, script, number):
    running = harness.start(script("import time\nprint('ready', flush=True)\ntime.sleep(60)"))
    running.wait_for_output("ready")
    running.signal(number)
    result = running.wait()
    assert result.returncode == -number
    assert ("KeyboardInterrupt" in result.stderr) == (number == signal.SIGINT)
    assert harness.run(script("print('alive')")).stdout == "alive\n"


def test_a_process_that_takes_too_long_is_killed_with_its_children(harness, script):
    path = script(
        """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        print("the end of the log", file=sys.stderr, flush=True)
        time.sleep(60)
        """
    )
    running = harness.start(path)
    running.wait_for_output("the end")
    with pytest.raises(pytest.fail.Exception, match="the end of the log"):
        running.wait(timeout=0.1)
    child = int(running.stdout_path.read_text())
    assert wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def test_forks_do_not_share_random_numbers_or_accelerate_state(harness, script):
    path = script(
        """
        import numpy, random
        from accelerate import Accelerator, PartialState
        assert not PartialState._shared_state
        print(Accelerator(cpu=True).num_processes, numpy.random.rand(), random.random())
        """
    )
    first, second = (harness.run(path).check().stdout.split() for _ in range(2))
    assert first[0] == second[0] == "1"
    assert not set(first[1:]) & set(second[1:])


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_in_a_fork_with_the_threads_asked_for(harness, script, threads):
    path = script(
        """
        import torch
        a = torch.ones(512, 512, requires_grad=True)
        (a @ a).sum().backward()
        print(torch.get_num_threads(), a.grad.mean().item())
        """
    )
    result = harness.run(path, env={"OMP_NUM_THREADS": threads}, timeout=60).check()
    assert result.stdout == f"{threads} 1024.0\n"


ALL_REDUCE = """
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(total.item(), os.environ["ROLE_NAME"], os.environ["ACCELERATE_MIXED_PRECISION"], sys.argv[1:])
dist.destroy_process_group()
"""


def test_two_ranks_meet(harness, script, tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\nnum_machines: 1\n"
        "machine_rank: 0\nnum_processes: 2\nmain_process_port: 0\nmpirun_config:\n  role: 'one two=3'\n"
    )
    ranks = harness.launch(script(ALL_REDUCE), "--name", "a b", config=config, num_processes=None, timeout=60)
    assert [rank.check().stdout for rank in ranks] == ["3.0 one two=3 bf16 ['--name', 'a b']\n"] * 2


def test_a_failure_shows_what_the_other_ranks_wrote(harness, script):
    path = script("import os, sys\nrank = os.environ['RANK']\nprint('this is', rank)\nsys.exit(3 + int(rank))")
    first, second = harness.launch(path)
    shown = r"exit code 3, not 0\n[^$]*this is 0\n[^$]*process 1 ended with 4\n[^$]*this is 1"
    with pytest.raises(pytest.fail.Exception, match=shown):
        first.check()
    assert second.check(4) == second


def test_one_rank_of_two_can_be_signalled(harness, script):
    path = script("import os, time\nprint('rank', os.environ['RANK'])\ntime.sleep(60)")
    ranks = harness.start_ranks(path)
    for number, rank in enumerate(ranks):
        rank.wait_for_output(f"rank {number}")
    for rank in ranks:
        rank.signal(signal.SIGKILL)
        assert rank.wait().returncode == -signal.SIGKILL


def test_the_launcher_of_one_process_gives_no_rank(harness, script, tmp_path):
    config = tmp_path / "one.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\n")
    path = script("import os\nprint(os.environ.get('RANK'), os.environ['ACCELERATE_MIXED_PRECISION'])")
    (only,) = harness.launch(path, config=config, num_processes=1)
    assert only.check().stdout == "None bf16\n"


@pytest.mark.slow
def test_ranks_see_what_accelerate_launch_gives_them(harness, script, tmp_path):
    path = script(
        """
        import json, os, pathlib, sys
        seen = {"argv": sys.argv[1:], "env": dict(os.environ)}
        pathlib.Path(f"{sys.argv[1]}-{os.environ['RANK']}.json").write_text(json.dumps(seen))
        """
    )
    arguments = ["--flag", "x y", "--config_file", "other"]
    for rank in harness.launch(path, tmp_path / "harness", *arguments, env={"MINE": "1"}):
        rank.check()
    harness.accelerate_launch(path, tmp_path / "real", *arguments, env={"MINE": "1"}).check()
    differ = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"}
    differ |= {"TORCHELASTIC_ERROR_FILE", "PYTHONUNBUFFERED"}
    for rank in range(2):
        forked, real = (json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for kind in ("harness", "real"))
        assert forked["argv"][1:] == real["argv"][1:] == arguments
        names = forked["env"].keys() | real["env"].keys()
        assert {name for name in names if forked["env"].get(name) != real["env"].get(name)} <= differ
        assert real["env"].keys() - forked["env"].keys() == set()


@pytest.mark.exhaustive
def test_the_cost_of_a_forked_run_is_reported(harness, script, capsys):
    path = script("import accelerate, torch\nfrom transformers import BertForMaskedLM\nprint('imported')")
    harness.run(path).check()  # starts the warm parent
    begin = time.perf_counter()
    assert [harness.run(path).check().stdout for _ in range(5)] == ["imported\n"] * 5
    forked = time.perf_counter() - begin
    begin = time.perf_counter()
    assert harness.command(sys.executable, path).check().stdout == "imported\n"
    fresh = time.perf_counter() - begin
    with capsys.disabled():
        print(f"\n5 forked runs {forked:.2f} s, 1 fresh run {fresh:.2f} s")  # reported: a loaded machine decides


@pytest.mark.slow
def test_nothing_outlives_the_harness(script, tmp_path):
    test = tmp_path / "test_inner.py"
    test.write_text(
        "from harness import Harness\n\ndef test():\n"
        f"    running = Harness().start({str(script('import time; time.sleep(60)'))!r})\n"
        "    import os, signal\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(running.pid))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(test)]
    inner = psutil.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=str(REPOSITORY / "tests"), TMPDIR=tmp_path))
    assert inner.wait(120) == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not psutil.pid_exists(pid))


def wait_until(condition, timeout=20):
    """Returns: whether the condition came true in time."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()
