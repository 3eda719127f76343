"""The C library's settings for large blocks of memory, which must be in the environment before a process starts.

glibc returns large blocks to the system and faults them in again, page by page, at every step. With these it uses huge
pages and keeps what it has: a third of the processor time of a step on a CPU. Nothing but the standard library is
imported here, so that a restart costs some hundredths of a second.

    python common/memory_settings.py command...     # runs a command with them
"""

import ctypes
import os
import platform
import sys

SETTINGS = {  # on glibc; what the user has set stays
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}


def missing_settings():
    """dict: the settings that would help here and are not in force."""
    if platform.libc_ver()[0] != "glibc":
        return {}
    return {name: value for name, value in SETTINGS.items() if name not in os.environ}


def restart_with_memory_settings():
    """Start this Python program again, in the same process, with the settings; once, and not where they are in force.

    To be called before anything large is imported. `--memory_settings false` turns it off, and so does any other way
    of being here than as the program that Python was started with.
    """
    missing = missing_settings()
    if not missing or _is_turned_off(sys.argv) or sys.orig_argv[-len(sys.argv) :] != sys.argv:
        return
    os.environ.update(missing)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back_memory():
    """Return to the system what was freed, which glibc keeps in pieces that may be too small for what comes next."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _is_turned_off(words):
    words = [word.lower().replace("-", "_") for word in words]
    off = ("false", "f", "no", "n", "0")  # as transformers' parser reads a bool
    spellings = {"__no_memory_settings", *(f"__memory_settings={word}" for word in off)}
    value = dict(zip(words, words[1:], strict=False)).get("__memory_settings")
    return value in off or not spellings.isdisjoint(words)


if __name__ == "__main__":
    os.environ.update(missing_settings())
    os.execvp(sys.argv[1], sys.argv[1:])
