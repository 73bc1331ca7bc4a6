"""Which ranks are on one host, and who of them receives for all."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def host_name() -> str:
    """This process's host. Machines that happen to share a name differ in the number of their last start."""
    number = ""
    with contextlib.suppress(OSError):
        number = _BOOT.read_text().strip()
    return f"{socket.gethostname()} {number}"


def leaders(hosts: Sequence[str], root: int) -> list[int]:
    """For each rank the one that receives for its host: the first there, and the root on its own.

    Args:
        hosts: each rank's host.
        root: the rank that has what is received.
    """
    first = {host: hosts.index(host) for host in hosts}
    first[hosts[root]] = root
    return [first[host] for host in hosts]
