"""`python fork_client.py FOLDER ARGUMENTS` is `python ARGUMENTS`, run by a copy of a fork server.

Ranks of odd and of even number have servers of their own: as with users, not all ranks see the elements of a
set in the same order.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys

NUMBER = struct.Struct("!i")
SERVERS = 2


def main(folder: str, *arguments: str) -> None:
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    text = json.dumps(request).encode()
    rank = int(os.environ.get("HOROVOD_RANK", "0"))
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.path.join(folder, str(rank % SERVERS)))
        socket.send_fds(server, [NUMBER.pack(len(text))], [0, 1, 2])
        server.sendall(text)
        process = _number(server)

        def pass_on(number, frame):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        exit_code = _number(server)
    if exit_code < 0:  # by a signal; the launcher shall see the same
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code)


def _number(server):
    data = b""
    while len(data) < NUMBER.size:
        part = server.recv(NUMBER.size - len(data))
        if not part:
            sys.exit("the fork server is gone")
        data += part
    return NUMBER.unpack(data)[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
