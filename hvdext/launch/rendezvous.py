"""Meeting again after `hvd.shutdown()`, at the launcher's key-value server.

Gloo's ranks find each other by addresses that they leave at the server horovodrun keeps open. The server
forgets the addresses of one meeting when all have read them, but loses count where hosts and ranks meet at
the same time; a second meeting would then call at doors that are closed. So before it, rank 0 waits for all
ranks and makes the server forget.
"""

from __future__ import annotations

import os
import time
import urllib.request

from hvdext.comm.kv_store import KeyValueStore
from hvdext.common.launcher import is_elastic, kv_store_address, rank_info

_PAUSE = 0.02  # seconds between two looks at the server


def meet_again(turn: int, seconds: float) -> None:
    """Returns once every rank has called it and the server knows no old address. Uses no engine.

    Without a server of horovodrun's, and in elastic jobs, whose server starts anew by itself: at once.

    Args:
        turn: the how manieth meeting of this process, the same on every rank.
        seconds: how long to wait.

    Raises:
        TimeoutError: if a rank does not come in time; the message names it.
    """
    address = kv_store_address(os.environ)
    if address is None or is_elastic(os.environ):
        return
    store = KeyValueStore(address, "hvdext-again")
    me = rank_info(os.environ)
    end = time.monotonic() + seconds
    if me.rank:
        scopes = f"local_{os.environ['HOROVOD_HOSTNAME']} cross_{me.local_rank}"
        store.post(f"{turn}.{me.rank}", scopes)
        _wait_for(store, f"{turn}.go", 0, end)
        return
    known = ["global", f"local_{os.environ['HOROVOD_HOSTNAME']}", "cross_0"]
    for other in range(1, me.size):
        known += _wait_for(store, f"{turn}.{other}", other, end).split()
    for scope in dict.fromkeys(known):
        _forget(address, scope, me.size)
    store.post(f"{turn}.go", "yes")


def _wait_for(store, key, rank, end):
    while time.monotonic() < end:
        text = store.read(key)
        if text is not None:
            return text
        time.sleep(_PAUSE)
    raise TimeoutError(
        f"rank {rank} has not called `hvd.init()` again; every rank must, after `hvd.shutdown()`."
    )


def _forget(address, scope, size):
    """The server clears a scope once as many have left it as belong to it; some may be counted already."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(size):
        if not KeyValueStore(address, scope).holds("0"):  # Gloo's addresses are no text
            return
        request = urllib.request.Request(f"http://{address}/{scope}/0", method="DELETE")
        opener.open(request, timeout=10).close()
