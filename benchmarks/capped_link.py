"""A slow network on one machine: a network namespace of its own, whose loopback device is capped.

    python benchmarks/capped_link.py 200        # what a link of 200 Mbit/s really lets through

Both directions between two ranks share the cap. Needs root, and `ip` and `tc` (Debian, Ubuntu:
`apt-get install iproute2`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# The bucket must hold at least one packet, or all are dropped: loopback's own packets have 65,536 bytes.
PACKET = "1500"  # bytes
BURST = "256kb"


@contextmanager
def capped_link(rate: int) -> Iterator[list[str]]:
    """Makes a namespace with a capped loopback device, and removes it in the end.

    Args:
        rate: Mbit/s.

    Yields:
        What to put before a command, so that it runs there; it finds no other network device than `lo`.

    Raises:
        RuntimeError: if it cannot be made; `unavailable()` tells beforehand.
    """
    name = f"capped-{os.getpid()}"
    inside = ["ip", "netns", "exec", name]
    run(["ip", "netns", "add", name])
    try:
        run([*inside, "ip", "link", "set", "lo", "up", "mtu", PACKET])
        bucket = ["tbf", "rate", f"{rate}mbit", "burst", BURST, "latency", "500ms"]
        run([*inside, "tc", "qdisc", "add", "dev", "lo", "root", *bucket])
        yield inside
    finally:
        run(["ip", "netns", "delete", name])


def unavailable() -> str | None:
    """Why no capped link can be made here; None if one can."""
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        return f"{' and '.join(missing)} must be installed (Debian, Ubuntu: apt-get install iproute2)"
    if os.geteuid():
        return "a network namespace of its own needs root"
    try:
        with capped_link(100):
            return None
    except RuntimeError as error:
        return str(error)


def measured_rate(inside: list[str]) -> float:
    """Mbit/s that the link really lets through in a second or two.

    Args:
        inside: what `capped_link` yields.
    """
    command = [*inside, sys.executable, __file__, "--send"]
    return float(run(command))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rate", type=int, nargs="?", default=200, help="Mbit/s")
    parser.add_argument("--send", action="store_true", help="measure the network that this process is in")
    options = parser.parse_args()
    if options.send:
        print(_rate_of_this_network())
    elif reason := unavailable():
        sys.exit(f"no capped link: {reason}")
    else:
        with capped_link(options.rate) as inside:
            print(f"capped at {options.rate} Mbit/s: {measured_rate(inside):.0f} Mbit/s of payload")


def _rate_of_this_network(seconds=1.5):
    """Sends over a connection with itself."""
    received = 0

    def receive():
        nonlocal received
        connection, _ = server.accept()
        while block := connection.recv(1 << 16):
            received += len(block)

    with socket.create_server(("127.0.0.1", 0)) as server:
        receiver = threading.Thread(target=receive)
        receiver.start()
        begin = time.perf_counter()
        with socket.create_connection(server.getsockname()) as sender:
            while time.perf_counter() < begin + seconds:
                sender.sendall(bytes(1 << 16))
        receiver.join()
    return 8e-6 * received / (time.perf_counter() - begin)


def run(command):
    """Runs a program; returns what it prints.

    Raises:
        RuntimeError: if it fails; with its words.
    """
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(finished.stderr or finished.stdout).strip()}")
    return finished.stdout


if __name__ == "__main__":
    main()
