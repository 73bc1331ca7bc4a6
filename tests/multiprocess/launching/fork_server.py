"""A process that has imported TensorFlow once and is copied for every rank that a test starts.

`python -m ...fork_server NUMBER` takes requests on the listening socket with that number, until its standard
input ends. A rank is a process of its own all the same: with the arguments, the environment, the folder and
the three streams that `fork_client` has been started with, with random numbers and a `__main__` of its own.
What is saved is the import, six seconds of computing for each rank.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys

NUMBER = struct.Struct("!i")
STREAMS = 3


def receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes; fewer if the other side has ended."""
    data = b""
    while len(data) < size and (part := connection.recv(size - len(data))):
        data += part
    return data


def _import_what_ranks_import() -> None:
    import keras  # noqa: F401
    import numpy  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import tensorflow  # noqa: F401

    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a copy would lack {len(threads) - 1} threads"
    gc.freeze()  # copies share it as long as no one writes to it


class _Server:
    """Copies itself when asked, and tells who asked how the copy has ended."""

    def __init__(self, listener: socket.socket):
        self._listener = listener
        self._ranks: dict[int, socket.socket] = {}  # by process
        self._selector = selectors.DefaultSelector()
        self._ended, ended = socket.socketpair()
        self._ended.setblocking(False)
        ended.setblocking(False)
        self._sockets = [listener, self._ended, ended]
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ended.fileno())
        self._selector.register(listener, selectors.EVENT_READ, self._start)
        self._selector.register(self._ended, selectors.EVENT_READ, self._report)
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._end)

    def run(self) -> list[str]:
        """Returns in copies only: the arguments of the Python that each is to be."""
        while True:
            for key, _ in self._selector.select():
                if arguments := key.data(key.fileobj):
                    return arguments

    def _start(self, _):
        connection, _ = self._listener.accept()
        head, streams, _, _ = socket.recv_fds(connection, NUMBER.size, STREAMS)
        request = json.loads(receive(connection, *NUMBER.unpack(head)))
        process = os.fork()
        if not process:
            connection.close()
            self._become(request, streams)
            return request["arguments"]
        for stream in streams:
            os.close(stream)
        self._ranks[process] = connection
        self._selector.register(connection, selectors.EVENT_READ, self._lose)
        _tell(connection, process)
        return None

    def _become(self, request, streams):
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for one in (*self._sockets, *self._ranks.values()):
            one.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])

    def _report(self, _):
        self._ended.recv(4096)
        for process in list(self._ranks):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                connection = self._ranks.pop(process)
                self._selector.unregister(connection)
                with connection:
                    _tell(connection, os.waitstatus_to_exitcode(status))

    def _lose(self, connection):
        """Who asked is gone, so the launcher has killed this rank."""
        (process,) = (process for process, known in self._ranks.items() if known is connection)
        self._selector.unregister(connection)
        self._ranks.pop(process).close()
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

    def _end(self, _):
        for process in self._ranks:
            os.kill(process, signal.SIGKILL)
        sys.exit()


def _tell(connection, number):
    with contextlib.suppress(OSError):  # a client that is gone is noticed soon
        connection.sendall(NUMBER.pack(number))


def _run(arguments: list[str]) -> None:
    """What `python ARGUMENTS` would."""
    import numpy as np

    np.random.seed()  # Python's own generator begins anew in every copy
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _import_what_ranks_import()
    _run(_Server(socket.socket(fileno=int(sys.argv[1]))).run())
