"""How a run ends when it cannot go on: one clear line and an exit code, never a traceback for bad input."""

import errno
import os
import signal
import sys

BAD_INPUT = 2  # exit code: something the user gave cannot be used
DIVERGED = 3  # exit code: the loss became NaN or infinite

# torch's errors for a process that another one waits for in vain, and gloo's words, which come as RuntimeError
CONNECTION_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
CONNECTION_WORDS = ("gloo/transport", "connection closed by peer", "connection reset by peer")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DEVICE_FULL = (
    "the device is full; halve --per_device_train_batch_size (the global batch stays) or --per_device_eval_batch_size,"
    " add --auto_find_batch_size or --gradient_checkpointing, choose a smaller --model_size, or a YAML in"
    " accelerate_configs/ that splits the model"
)


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""

    exit_code = BAD_INPUT


class DivergedError(Exception):
    """The loss is no longer a number. The message names the step and what to do."""

    exit_code = DIVERGED


def run_main(main):
    """Run a script's main() and turn the errors above into one line on stderr and their exit code.

    Args:
        main: function without arguments; its return value, None or an int, becomes the exit code.
    Raises:
        SystemExit: always, with the exit code.
    """
    rank = os.environ.get("RANK", "0")
    try:
        code = main()
    except (UserError, DivergedError) as error:
        if rank == "0":  # every rank meets the same bad input; one says so
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except (OSError, RuntimeError, MemoryError) as error:
        if is_connection_lost(error):
            from common.parallel.watch import end_after_loss  # not above: what is there raises the errors above

            end_after_loss(error)
        fault = limit_reached(error)
        if fault is None:
            raise
        where = "" if rank == "0" else f"process {rank}: "  # a limit may be met by one rank alone
        print(f"error: {where}{fault}", file=sys.stderr, flush=True)
        code = BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    sys.exit(code or 0)


def first_line(error):
    """What an exception says, in one line: its message's first, or the name of its class where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def limit_reached(error):
    """What a system error means for the user, in one line: a full device, a full disk, a file that cannot be used.

    Args:
        error: OSError, RuntimeError or MemoryError.
    Returns:
        str, or None where it is none of these and its traceback is wanted.
    """
    if is_out_of_memory(error):
        return DEVICE_FULL
    if not isinstance(error, OSError):
        return None
    if error.errno in DISK_FULL:
        return f"{error.filename or 'a file'}: {error.strerror}; what was complete is intact: free space, continue"
    return f"{error.filename}: {error.strerror}; name another path" if error.filename else None


def is_out_of_memory(error):
    """Whether an exception says that the device (or the host) is full."""
    # the last is oneDNN's, when there is no memory for the code it generates
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def is_connection_lost(error):
    """Whether an exception says that another process of the run has ended or cannot be reached."""
    words = any(word in str(error).lower() for word in CONNECTION_WORDS)
    return type(error).__name__ in CONNECTION_ERRORS or (isinstance(error, RuntimeError) and words)
