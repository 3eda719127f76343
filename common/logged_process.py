"""A process that locks the log it writes to, so that one that outlives its caller is noticed, not started twice."""

import fcntl
import os
import re
import signal
import subprocess


class Process:
    """A command at work, and all that it starts in turn: they hold the lock of its log.

    Args:
        words: the command; log: Path; env: dict; lock: the log, open and locked.
    """

    def __init__(self, words, log, env, lock):
        self.log, self._begin = log, lock.tell()
        # A session of its own: Ctrl-C is for the caller, which then calls stop().
        self._leader = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=lock,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )

    def poll(self):
        """The exit code; None while it, or anything that it has started, still runs."""
        code = self._leader.poll()
        if code is None or is_locked(self.log):
            return None
        # A launcher makes every code 1, and says what it was in its last lines.
        launched = re.findall(r"(?:exitcode\s*: |exit status )(\d+)", self.output())
        return int(launched[-1]) if code == 1 and launched else code

    def output(self):
        """What it has written so far."""
        with open(self.log, "rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def stop(self):
        """Ask all of it to save and end."""
        try:
            os.killpg(self._leader.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass


def lock_log(file):
    """Lock a log that is open for writing, for the process that is about to write to it.

    Returns:
        False where a process that writes to it still runs.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(log):
    """Whether a process that writes to this log still runs."""
    with open(log, "rb") as file:
        return not lock_log(file)


def last_line(text):
    """The last line that is not blank; none of an empty text."""
    return ([""] + [line for line in text.splitlines() if line.strip()])[-1]
