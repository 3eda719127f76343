"""What `accelerate launch` would start: its own code, stopped where it would start the processes.

    python tests/harness_launch.py --config_file X.yaml script.py arguments...

prints one JSON object: argv and environment of the processes and, where torchrun starts them, its options.
"""

import json
import os
from types import SimpleNamespace

import torch.distributed.run
from accelerate.commands import launch


def describe_simple(command, env):
    """Stand in for the subprocess.Popen of accelerate's launcher of one process."""
    print(json.dumps({"argv": command[1:], "env": env, "torchrun": None}))
    raise SystemExit


def describe_torchrun(config, entrypoint):
    """Stand in for torchrun's elastic_launch."""
    torchrun = {
        "role": config.role,
        "run_id": config.run_id,
        "local_world_size": config.nproc_per_node,
        "max_restarts": config.max_restarts,
        "signals_to_handle": config.signals_to_handle,
    }

    def describe(unbuffered, *argv):
        assert unbuffered == "-u"
        env = dict(os.environ, PYTHONUNBUFFERED="1")
        print(json.dumps({"argv": argv, "env": env, "torchrun": torchrun}))

    return describe


if __name__ == "__main__":
    launch.subprocess = SimpleNamespace(Popen=describe_simple)
    torch.distributed.run.elastic_launch = describe_torchrun
    launch.main()
