"""The notice board that rank 0 opens where the launcher has none."""

import json
import time
import urllib.request

import pytest

from hvdext.board import Board, open_server, own_board
from hvdext.ledger import Ledger
from hvdext.testing import run_ranks
from hvdext.watchdog import Watchdog

pytest.importorskip("horovod.runner.http.http_server", reason="the server is Horovod's", exc_type=ImportError)


def test_ranks_read_each_others_notes():
    def run(comm):
        board = own_board(comm)
        board.post(str(comm.rank), f"from {comm.rank}")
        comm.barrier("hvdext.test.posted")
        found = [board.read(str(rank)) for rank in range(4)]
        comm.barrier("hvdext.test.read")
        return found

    assert run_ranks(3, run) == [["from 0", "from 1", "from 2", None]] * 3


def test_a_note_cut_short_counts_as_none():
    def run(comm):
        board = own_board(comm)
        whole = json.dumps({"time": time.time(), "progress": {"hvdext.grad.x.0": [comm.rank, 0]}})
        board.post(str(comm.rank), whole[:-9] if comm.rank == 1 else whole)
        comm.barrier("hvdext.test.posted")
        watchdog = Watchdog(comm.rank, Ledger(3), board, 1.0)
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
    board = Board(address, "global")
    assert board.holds("0")
    assert not board.holds("1")


def test_a_board_out_of_reach_holds_nothing():
    board = Board("127.0.0.1:9", "hvdext")  # nobody listens there
    board.post("0", "lost")
    assert board.read("0") is None
    assert not board.holds("0")
