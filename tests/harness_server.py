"""A warm Python process that runs scripts in forks of itself, so that a test does not pay for their imports.

harness.Harness starts it and talks to it: one JSON object a line on stdin, one answer a line on stdout, until the end
of stdin, when every process that still runs is killed. The server starts no thread and computes nothing: a fork of a
process whose OpenMP threads have started hangs at its first parallel operation.

A fork ends as Python does, exit handlers included, but skips the last step, the destruction of every module: it costs
ten times as much as all the rest. What may happen there is seen by harness.command.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import types

KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET of Linux
# The scripts, and what they import when they need it.
SCRIPTS = ("run_clm", "run_glue", "run_pretraining", "prepare_pile_data")
SCRIPTS += ("common.metrics", "common.parallel.pipeline", "common.parallel.sharded")
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

exit_code = None  # of the script in this fork, once it has ended; None where Python is to end in its own way


def import_libraries():
    """Import the entry scripts with all that they need, and what they import when they need it."""
    import accelerate.commands.launch  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch
    import torch._dynamo  # the first optimizer step imports it
    import torch.distributed.run
    import transformers

    sys.path[0] = REPOSITORY  # each fork puts the folder of its script there
    for name in SCRIPTS:
        importlib.import_module(name)
    if not torch.cuda.is_available():  # with a GPU, a fork that uses it and one that does not need different ones
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("common.parallel.zero")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # and with it torch's compiler
        for name in ("common.parallel.colossalai", "common.parallel.colossalai_cpu"):  # which replaces nothing yet
            importlib.import_module(name)

    for name in (
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        "BertTokenizerFast",
        "FillMaskPipeline",
        "OPTForCausalLM",
        "PreTrainedTokenizerFast",
    ):
        getattr(transformers, name)  # transformers imports its modules at their first use

    threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
    if threads != 1 or torch.cuda.is_initialized():
        raise RuntimeError(f"the imports started {threads - 1} threads or CUDA: forks of this process would hang")


def serve(requests, answers):
    """Answer requests until they end.

    Args:
        requests: text file of {"argv", "env", "cwd", "stdout", "stderr", "namespace", "pause_at"} (run it; the answer
            is its pid) and {"poll": pid} (the answer is its exit code, negative for a signal, or null while it runs).
        answers: text file for the answers.
    Returns:
        The request, in the forked process that is to run it; None in the server, at the end.
    """
    running = set()
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
            os.setpgid(answer, answer)  # here too: the client may kill the group before the child has run
            running.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    return None


def run_script(argv, env, cwd, stdout, stderr, namespace, pause_at):
    """Become `python script arguments...` with exactly this environment, folder, output files and network."""
    import numpy
    import torch

    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    if namespace:
        with open(f"/run/netns/{namespace}") as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), NETWORK_NAMESPACE):
                raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_APPEND),
        (2, stderr, os.O_WRONLY | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags), descriptor)
    os.environ.clear()
    os.environ.update(env)
    if "PYTHONUNBUFFERED" in env:
        sys.stdout.reconfigure(line_buffering=True)
    os.chdir(cwd)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    numpy.random.seed()  # otherwise all forks would draw the same numbers, and hide a seed that is missing

    if pause_at is not None:
        pause_after_step(pause_at)
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    sys.excepthook = print_exception
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = argv[0]
    with open(argv[0], "rb") as script:
        code = compile(script.read(), argv[0], "exec")
    global exit_code
    exit_code = 1  # for any exception but these
    try:
        exec(code, main.__dict__)
        exit_code = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            exit_code = end.code or 0
        raise
    except KeyboardInterrupt:
        exit_code = None  # Python ends by sending itself the signal
        raise


def pause_after_step(step):
    """Let this process stop itself, once, when it has logged the loss of this training step or a later one."""
    from common.report import MetricsLog

    write = MetricsLog.write

    def write_and_pause(self, row):
        write(self, row)
        if self.is_main and "loss" in row and row["step"] >= step:
            MetricsLog.write = write
            os.kill(os.getpid(), signal.SIGSTOP)

    MetricsLog.write = write_and_pause


def skip_destruction():
    """Exit handler, registered first and so called last."""
    if exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def print_exception(kind, error, traceback):
    """Print a traceback as Python does, without the frames of this file."""
    while traceback and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


if __name__ == "__main__":
    atexit.register(skip_destruction)
    answers = os.fdopen(os.dup(1), "w")  # os.dup makes it private to this process and its forks
    os.dup2(2, 1)  # what an import prints goes to the log, not among the answers
    import_libraries()
    gc.collect()
    gc.freeze()  # forks share these objects' memory as long as the collector does not write to them
    sys.stdout.flush()
    request = serve(sys.stdin, answers)
    if request is None:
        os._exit(0)
    answers.close()
    run_script(**request)  # its end, SystemExit or exception is this process's own
