"""The job's key-value store: short texts that outlive a stuck collective.

horovodrun keeps a small key-value server open for the ranks to find each other. It goes on answering
while the engine hangs, which makes it the place to ask who is missing. Under another launcher rank 0
opens such a server.
"""

from __future__ import annotations

import http.client
import os
import secrets
import urllib.request
from typing import TYPE_CHECKING

from hvdext.common.addresses import own_addresses
from hvdext.common.launcher import kv_store_address

if TYPE_CHECKING:  # hvd.run uses the store without TensorFlow
    from hvdext.comm.communicator import Communicator

_SECONDS = 3.0  # per request: the store must never become a wait of its own


class KeyValueStore:
    """A key-value server that every rank can reach.

    Args:
        address: `host:port`.
        scope: keeps this job's keys apart from the launcher's.
    """

    def __init__(self, address: str, scope: str):
        self._url = f"http://{address}/{scope}/"

    def post(self, key: str, text: str) -> None:
        """Writes `text` under `key`. A store out of reach is not an error: the launcher may be ending."""
        request = urllib.request.Request(self._url + key, data=text.encode(), method="PUT")
        self._open(request)

    def read(self, key: str) -> str | None:
        """The text under `key`; None if there is none or the store is out of reach."""
        answer = self._open(urllib.request.Request(self._url + key))
        return None if answer is None else answer.decode()

    def holds(self, key: str) -> bool:
        """Whether there is anything under `key`, text or not; False if the store is out of reach."""
        return self._open(urllib.request.Request(self._url + key)) is not None

    @staticmethod
    def _open(request):
        # No proxies: the store is the job's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_SECONDS) as response:
                return response.read()
        except (http.client.HTTPException, OSError):
            return None


def shared_store(comm: Communicator) -> KeyValueStore | None:
    """The job's store: the launcher's, or else one that rank 0 opens. Every rank must call it.

    Returns:
        None if this rank reaches none of rank 0's addresses.
    """
    address = kv_store_address(os.environ)
    return KeyValueStore(address, "hvdext") if address else own_store(comm)


def own_store(comm: Communicator) -> KeyValueStore | None:
    """A store that rank 0 opens and every rank reaches, or None. Every rank must call it."""
    # A scope of this job's own: on another host the same port may belong to another job.
    opened = (open_server(), f"hvdext-{secrets.token_hex(8)}") if comm.rank == 0 else None
    addresses, scope = comm.broadcast_object(opened, 0, "hvdext.board.addresses")
    if comm.rank == 0:
        KeyValueStore(addresses[0], scope).post("open", "yes")
    comm.barrier("hvdext.board.open")
    for address in addresses:
        store = KeyValueStore(address, scope)
        if store.read("open") == "yes":
            return store
    return None


def open_server() -> list[str]:
    """Starts a server that lives as long as this process; returns the addresses it may be reached at."""
    from horovod.runner.http.http_server import KVStoreServer

    port = KVStoreServer(verbose=0).start_server()
    return [f"{host}:{port}" for host in own_addresses()]
