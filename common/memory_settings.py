"""Settings of the C library and of OpenMP, which must be in the environment before a process starts.

glibc returns large blocks to the system and faults them in again, page by page, at every step. With these it uses huge
pages and keeps what it has: a third of the processor time of a step on a CPU. GNU's OpenMP lets a thread that waits
for the others turn in a loop for milliseconds, in which another program that shares the processor keeps those others
from ending; after 5,000 turns it sleeps. With 1,000, a step on two cores with two more busy processes took a tenth of
the time that it took without a limit, and 5,000 were no slower there (0.66 s for 0.74, one run). But after 1,000 it
sleeps between the short operations of a small model, too: a step of bert-mini on idle cores took 0.31 s with them and
0.28 s with 5,000 (medians of five runs, whose ranges overlap).

Nothing but the standard library is imported here, so that a restart costs some hundredths of a second.

    python common/memory_settings.py command...     # runs a command with them
"""

import contextlib
import ctypes
import os
import platform
import sys

MMAP_THRESHOLD = -3  # of mallopt, as <malloc.h> has it
SMALLEST_GIVEN_BACK, LARGEST_BY_ITSELF = 1 << 17, 32 << 20  # where it begins, and how far it goes by itself
LARGEST_INT = 2**31 - 1  # which mallopt takes
SETTINGS = {  # on glibc; what the user has set stays
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "GOMP_SPINCOUNT": "5000",
}


def missing_settings():
    """dict: the settings that would help here and are not in force."""
    if platform.libc_ver()[0] != "glibc":
        return {}
    known = set(os.environ)
    if "OMP_WAIT_POLICY" in known:  # which GOMP_SPINCOUNT would override
        known.add("GOMP_SPINCOUNT")
    return {name: value for name, value in SETTINGS.items() if name not in known}


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


@contextlib.contextmanager
def giving_back_memory():
    """Context in which large blocks go back to the system when they are freed.

    Where a model is built tensor by tensor, what glibc keeps comes to twice the model: something small that stays lies
    in every gap, and the next tensor of the same size goes elsewhere.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library, before = ctypes.CDLL(None), int(os.environ.get("MALLOC_MMAP_THRESHOLD_", LARGEST_BY_ITSELF))
    library.mallopt(MMAP_THRESHOLD, SMALLEST_GIVEN_BACK)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, min(before, LARGEST_INT))


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
