"""The key-value store that rank 0 opens where the launcher has none."""

import json
import time
import urllib.request

import pytest

from hvdext.comm.kv_store import KeyValueStore, open_server, own_store
from hvdext.comm.ledger import Ledger
from hvdext.comm.watchdog import Watchdog
from hvdext.testing import run_ranks

pytest.importorskip("horovod.runner.http.http_server", reason="the server is Horovod's", exc_type=ImportError)


def test_ranks_read_each_others_notes():
    def run(comm):
        store = own_store(comm)
        store.post(str(comm.rank), f"from {comm.rank}")
        comm.barrier("hvdext.test.posted")
        found = [store.read(str(rank)) for rank in range(4)]
        comm.barrier("hvdext.test.read")
        return found

    assert run_ranks(3, run) == [["from 0", "from 1", "from 2", None]] * 3


def test_a_note_cut_short_counts_as_none():
    def run(comm):
        store = own_store(comm)
        whole = json.dumps({"time": time.time(), "progress": {"hvdext.grad.x.0": [comm.rank, 0]}})
        store.post(str(comm.rank), whole[:-9] if comm.rank == 1 else whole)
        comm.barrier("hvdext.test.posted")
        watchdog = Watchdog(comm.rank, Ledger(3), store, 1.0)
        notes = [watchdog._read(rank) for rank in range(3)]
        comm.barrier("hvdext.test.read")
        return [note and note.progress for note in notes]

    expected = [{"hvdext.grad.x.0": [0, 0]}, None, {"hvdext.grad.x.0": [2, 0]}]
    assert run_ranks(3, run) == [expected] * 3


def test_what_is_no_text_is_there_all_the_same():
    """As the addresses are that Gloo leaves at the launcher's server."""
    (address, *_) = open_server()
    request = urllib.request.Request(f"http://{address}/global/0", data=b"\x02\x85", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()
    store = KeyValueStore(address, "global")
    assert store.holds("0")
    assert not store.holds("1")


def test_a_board_out_of_reach_holds_nothing():
    store = KeyValueStore("127.0.0.1:9", "hvdext")  # nobody listens there
    store.post("0", "lost")
    assert store.read("0") is None
    assert not store.holds("0")
