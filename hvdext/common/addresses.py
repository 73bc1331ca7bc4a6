"""At which addresses this host is reached."""

from __future__ import annotations

import socket

import psutil


def own_addresses(interface: str | None = None) -> list[str]:
    """All IPv4 addresses of this host, loopback among them.

    Args:
        interface: whose addresses come first, such as "eth0"; None: in the system's order.
    """
    found = psutil.net_if_addrs()
    names = sorted(found, key=lambda name: name != interface)
    return [a.address for name in names for a in found[name] if a.family == socket.AF_INET]


def addresses_for_others(interface: str | None = None) -> list[str]:
    """The IPv4 addresses that other hosts may reach this one at; on a host without any, loopback.

    Args:
        interface: whose addresses come first; None: in the system's order.
    """
    mine = own_addresses(interface)
    return [address for address in mine if not address.startswith("127.")] or ["127.0.0.1"]
