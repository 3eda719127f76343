"""How a run ends when it cannot go on: one clear line and an exit code, never a traceback for bad input."""

import errno
import os
import signal
import sys

BAD_INPUT = 2  # exit code: something the user gave cannot be used
DIVERGED = 3  # exit code: the loss became NaN or infinite

DEVICE_FULL = (
    "the device is full; halve --per_device_train_batch_size (the global batch stays) or --per_device_eval_batch_size,"
    " add --auto_find_batch_size or --gradient_checkpointing, or choose a smaller --model_size"
)


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""

    exit_code = BAD_INPUT


class DivergedError(Exception):
    """The loss is no longer a number. The message names the step and the last good checkpoint."""

    exit_code = DIVERGED


def run_main(main):
    """Run a script's main() and turn the errors above into one line on stderr and their exit code.

    Args:
        main: function without arguments; its return value, None or an int, becomes the exit code.
    Raises:
        SystemExit: always, with the exit code.
    """
    try:
        code = _with_named_limits(main)
    except (UserError, DivergedError) as error:
        if os.environ.get("RANK", "0") == "0":  # every rank sees the same bad input; one says so
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    sys.exit(code or 0)


def is_out_of_memory(error):
    """Whether an exception says that the device (or the host) is full."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _with_named_limits(main):
    try:
        return main()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(DEVICE_FULL) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        where = error.filename or "the output folder"
        raise UserError(
            f"cannot write {where}: {error.strerror}; what was complete before is intact; free space, then continue"
        ) from error
