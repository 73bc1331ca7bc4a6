"""Which addresses a host tells others."""

import socket
import types

import psutil
import pytest

from hvdext.common.addresses import addresses_for_others, own_addresses


@pytest.fixture
def interfaces(monkeypatch):
    found = {}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)

    def add(name, *addresses):
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        pairs = zip(addresses, families, strict=True)
        found[name] = [types.SimpleNamespace(address=a, family=family) for a, family in pairs]

    return add


def test_loopback_is_for_this_host_only(interfaces):
    interfaces("lo", "127.0.0.1", "::1")
    assert own_addresses() == addresses_for_others() == ["127.0.0.1"]
    interfaces("eth0", "10.0.0.1", "fe80::1")
    interfaces("ib0", "10.1.0.1")
    assert own_addresses() == ["127.0.0.1", "10.0.0.1", "10.1.0.1"]
    assert addresses_for_others() == ["10.0.0.1", "10.1.0.1"]


def test_the_interface_that_was_chosen_comes_first(interfaces):
    interfaces("eth0", "10.0.0.1")
    interfaces("ib0", "10.1.0.1")
    assert own_addresses("ib0") == addresses_for_others("ib0") == ["10.1.0.1", "10.0.0.1"]
    assert own_addresses("none") == ["10.0.0.1", "10.1.0.1"]
