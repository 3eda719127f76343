"""What a user has written beside this collection: a class or function of a file or of a module, by its name."""

import importlib.util
import os
import sys
from pathlib import Path

from common.errors import UserError


def is_plugin(name: str) -> bool:
    """Whether a name has the form path/to/file.py:Name or module:Name."""
    module, _, member = name.rpartition(":")
    return bool(module and member)


def load_plugin(flag: str, name: str):
    """Import what a flag names.

    Args:
        flag: as the user gave it, for messages; name: path/to/file.py:Name, or module:Name of the working directory or
            the Python path.
    Returns:
        (module's name, the member or None where the module has none of this name).
    Raises:
        UserError: it cannot be imported.
    """
    module_name, _, member = name.rpartition(":")
    try:
        module = _load_file(module_name) if module_name.endswith(".py") else _load_module(module_name)
    except Exception as error:  # importing runs the user's file, which may fail in any way
        where = "" if module_name.endswith(".py") else " from the working directory or PYTHONPATH"
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{flag}: importing {module_name}{where} failed: {fault}") from error
    return module_name, getattr(module, member, None)


def _load_module(name):
    if os.getcwd() not in sys.path:  # a script's own folder is there, the working directory is not
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _load_file(path):
    path = Path(path).expanduser().resolve()
    name = f"frugal_{path.stem}"  # under a name of its own, so that a file may be called torch.py
    if name not in sys.modules or sys.modules[name].__file__ != str(path):
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
