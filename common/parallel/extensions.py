"""DeepSpeed's compiled extensions: built once, before they are needed, with a word to the user."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory

from common.errors import UserError, first_line, run_main

BUILDERS = {"deepspeed_shm_comm": "ShareMemCommBuilder", "cpu_adam": "CPUAdamBuilder"}  # by their folders' names
BATON = "lock"  # torch's file in the folder of a build; a build that was killed leaves it, and later ones wait forever
GUARD = ".building"  # ours, held by a process that builds, and free when it is dead


def build_extension(name):
    """Build an extension if it is missing, and load it. The processes of a machine take turns; one says it.

    Args:
        name: in BUILDERS.
    Raises:
        UserError: no compiler, a build that fails, or a lock that a killed build has left.
    """
    if sys.prefix != sys.base_prefix:  # torch's own folder is a user's: two environments would build over each other
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    folder = Path(_get_build_directory(name, verbose=False))
    if not any(folder.glob("*.so")):
        if not shutil.which(os.environ.get("CXX", "g++")):
            raise UserError(f"DeepSpeed's {name} has to be compiled and there is no C++ compiler: install g++")
        if os.environ.get("LOCAL_RANK", "0") == "0":  # whichever process then builds
            print(f"building DeepSpeed's {name} in {folder}, once; it takes minutes", flush=True)
    with open(folder / GUARD, "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if (folder / BATON).exists():
            raise UserError(f"{folder / BATON}: a build that was killed has left this lock: remove it and start again")
        if not shutil.which("ninja"):  # it was installed with Python's packages, which nobody need have activated
            os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
        try:
            get_accelerator().create_op_builder(BUILDERS[name]).load()
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
            (folder / BATON).unlink(missing_ok=True)
            fault = first_line(error)
            raise UserError(
                f"DeepSpeed's {name} cannot be built in {folder}: {fault}; is the compiler whole?"
            ) from error


def build_all():
    """Build what the YAMLs may ask for on this machine."""
    on_cpu = get_accelerator().device_name() == "cpu"
    for name in BUILDERS:
        if on_cpu or name == "cpu_adam":
            build_extension(name)
            print(f"DeepSpeed's {name} is ready")


if __name__ == "__main__":
    run_main(build_all)
