"""Which process of a run has ended too early: each holds a connection to the main process, and a thread looks at it.

A collective that waits for a dead process fails late or never, and does not say for whom it waited. The system closes
the connections of a process that dies, and gives up those to a machine that no longer answers.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from common.errors import UserError, first_line

CONNECT_SECONDS = 60
HANDSHAKE_SECONDS = 5
SILENT_SECONDS = 25  # after which a machine that does not answer is given up
GRACE_SECONDS = 10  # for a process to end by itself, with a message of its own
KNOWN_SECONDS = 3  # a collective may fail before the connection of the process that it waited for is closed
FAILED = 1  # exit code, as of a process that ends with a traceback
BYE = b"bye"
# Of the system, where it has them: seconds until the first question, between questions, milliseconds until an end.
SOCKET_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 1000 * SILENT_SECONDS}

_watch = None  # of this process, if it is one of several


def start_watch(rank, world, place_of):
    """Connect this process to the others. Every process calls it.

    Args:
        rank, world: int, number of this process and of processes.
        place_of: function of a number giving what else people call that process, with a space before, or nothing.
    Raises:
        UserError: the main process cannot be reached on a port of its choice.
    """
    global _watch
    _watch = Watch(rank, world, place_of)


def stop_watch():
    """From here on this process may end without ending the others."""
    if _watch:
        _watch.stop()


def end_after_loss(error):
    """End this process if it lost the connection to another one: one line on stderr, exit code 1.

    Args:
        error: what a collective raised; of NCCL, whose errors may mean anything, only where a process has ended.
    """
    lost = _watch.gone(KNOWN_SECONDS) if _watch else None
    if lost is None and type(error) is dist.DistBackendError:
        return
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    _end(rank, world, lost, "" if lost is not None else f" ({first_line(error)})")


class Watch:
    """The connections of this process: the main one's to all others, the others' to the main one.

    Args:
        rank, world, place_of: as start_watch.
    """

    def __init__(self, rank, world, place_of):
        self._rank, self._world, self.place_of = rank, world, place_of
        self._lost, self._known, self._over = None, threading.Event(), False
        self._connections = _accept(world) if rank == 0 else _connect(rank)
        threading.Thread(target=self._look, daemon=True).start()

    def gone(self, seconds):
        """The number of the first process that ended too early, waiting some time to hear of it; None for none."""
        self._known.wait(seconds)
        return self._lost

    def stop(self):
        """Tell the others that this process ends in order."""
        self._over = True
        self._say(BYE)

    def _say(self, word):
        for connection in self._connections:
            with suppress(OSError):  # it has ended, too
                connection.sendall(word + b"\n")

    def _look(self):
        with selectors.DefaultSelector() as selector:
            for connection, rank in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    word = _receive(key.fileobj)
                    if word != BYE:  # a number from the main process, or nothing: the other end was closed
                        return self._report(int(word or key.data))
                    selector.unregister(key.fileobj)

    def _report(self, lost):
        if self._rank == 0:
            self._say(b"%d" % lost)
        self._lost = lost
        self._known.set()
        time.sleep(GRACE_SECONDS)
        if not self._over:
            _end(self._rank, self._world, lost)


def _accept(world):
    """The main process's connections, once all others have connected. Returns: dict of sockets to ranks."""
    family = socket.getaddrinfo(os.environ["MASTER_ADDR"], None)[0][0]
    found, deadline = {}, time.monotonic() + CONNECT_SECONDS
    with socket.create_server(("", 0), family=family, backlog=world) as listener:
        token = secrets.token_hex(16)  # so that nobody else takes part
        dist.broadcast_object_list([(listener.getsockname()[1], token)], src=0)
        while len(found) < world - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                missing = min(set(range(1, world)) - set(found.values()))
                raise UserError(
                    f"process {missing} of {world} cannot connect to process 0, on a port of its choice: let the "
                    "machines reach each other on all ports"
                ) from error
            connection.settimeout(HANDSHAKE_SECONDS)
            said, _, rank = _receive(connection).partition(b" ")
            if secrets.compare_digest(said, token.encode()):
                found[_keep(connection)] = int(rank)
            else:
                connection.close()
    return found


def _connect(rank):
    """The connection of another process. Returns: dict of the socket to the main process's rank."""
    box = [None]
    dist.broadcast_object_list(box, src=0)
    port, token = box[0]
    try:
        connection = socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECT_SECONDS)
        connection.sendall(f"{token} {rank}\n".encode())
    except OSError as error:
        raise UserError(
            f"process {rank} cannot connect to process 0 at {os.environ['MASTER_ADDR']}:{port} ({error}): let the "
            "machines reach each other on all ports"
        ) from error
    return {_keep(connection): 0}


def _keep(connection):
    """Let the system find out by itself that the other end's machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SOCKET_OPTIONS.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _receive(connection):
    """The line that was sent, b"" where the connection is closed or given up."""
    try:
        return connection.recv(128).partition(b"\n")[0]
    except OSError:
        return b""


def _end(rank, world, lost, detail=""):
    who = "another process" if lost is None else f"process {lost}{_watch.place_of(lost)}"
    with suppress(OSError):
        sys.stdout.flush()
        print(
            f"error: process {rank} of {world}: {who} has ended or cannot be reached{detail}; the same command with "
            "--resume_from_checkpoint latest continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    os._exit(FAILED)  # without the end of Python, where what is left of the group would wait for the dead
