"""What the watchdog says, whom it accuses, and that it ends a process that waits."""

import json
import subprocess
import sys

import pytest
import tensorflow as tf

from hvdext.comm.ledger import Ledger
from hvdext.comm.watchdog import EXIT_CODE, Note, Watchdog, verdict

NAME = "hvdext.grad.sgd.0"


def test_missing_ranks_are_named():
    notes = {
        0: Note(1.0, {NAME: (3, 2)}),
        2: Note(2.4, {NAME: (2, 2)}),
        3: Note(0.2, {}),
        4: None,
    }
    lines = verdict(1, NAME, 3, 6.4, notes, True).strip().splitlines()
    assert lines[0].startswith(f"hvdext: rank 1 has waited 6 s in collective '{NAME}', step 3")
    assert [line.strip() for line in lines[1:4]] == [
        "rank 2 has not arrived: it has started this collective 2 times (last report 2 s ago)",
        "rank 3 has not arrived: it has started this collective 0 times (last report 0 s ago)",
        "rank 4 has not arrived: it has never reported",
    ]
    assert "rank 0 has" not in "".join(lines)
    assert "HVDEXT_DEADLINE" in lines[-1]


def test_nobody_is_missing():
    text = verdict(0, NAME, 3, 6, {1: Note(1.0, {NAME: (3, 2)})}, True)
    assert "All ranks have arrived" in text
    assert "not arrived" not in text


def test_without_a_board_nobody_is_accused():
    text = verdict(0, NAME, 3, 6, {1: None}, False)
    assert "not known" in text
    assert "rank 1" not in text


# -- the ledger's labels and members --------------------------------------------------------------------


def test_a_collective_of_some_ranks_is_labelled_with_them():
    ledger = Ledger(4)
    ledger.entry(NAME, (0, 1, 2, 3)).start([tf.constant(1)])
    some = ledger.entry(NAME, (0, 2))
    for _ in range(2):
        some.finish(some.start([tf.constant(1)]), sent=8)
    assert ledger.entry(NAME, (0, 2)) is some
    label = f"{NAME} of ranks [0, 2]"
    assert ledger.progress() == {NAME: (1, 0), label: (2, 2)}
    assert ledger.members(NAME) == (0, 1, 2, 3)
    assert ledger.members(label) == (0, 2)
    assert (ledger.traffic()["grad"].calls, ledger.traffic()["grad"].bytes) == (2, 16)


# -- notes ---------------------------------------------------------------------------------------------


class _Notes:
    """A store whose texts are given."""

    def __init__(self, texts):
        self._texts = texts

    def read(self, key):
        return self._texts.get(key)


def test_a_join_waits_as_long_as_the_others_get_on():
    ledger = Ledger(2)
    ledger.entry("hvdext.join", (0, 1)).start([tf.constant(1)])
    store = {"1": '{"time": 1.0, "progress": {"hvdext.grad.sgd.0": [3, 2]}}'}
    watchdog = Watchdog(0, ledger, _Notes(store), 1.0)
    assert watchdog._others_advance()
    assert not watchdog._others_advance()
    store["1"] = '{"time": 2.0, "progress": {"hvdext.grad.sgd.0": [4, 3]}}'
    assert watchdog._others_advance()
    del store["1"]
    assert not watchdog._others_advance()


@pytest.mark.parametrize("text", ['{"time": 1.0, "progress": {"hvdext.gr', "", None])
def test_a_note_cut_short_counts_as_none(text):
    whole = '{"time": 1.0, "progress": {"hvdext.grad.sgd.0": [3, 2]}}'
    watchdog = Watchdog(0, Ledger(2), _Notes({"0": whole, "1": text}), 1.0)
    assert watchdog._read(0).progress == {NAME: [3, 2]}
    assert watchdog._read(1) is None


# -- in a process of its own -----------------------------------------------------------------------------

_PROGRAM = """
import json
import time
from hvdext.comm.ledger import Ledger
from hvdext.comm.watchdog import Watchdog
import tensorflow as tf

class KeyValueStore:
    # Keeps what this rank posts. The others: rank 2 is one step behind, ranks 1 and 3 never report.
    def __init__(self):
        behind = {{"hvdext.test.wait of ranks [0, 2]": [0, 0]}}
        self.notes = {{"2": json.dumps({{"time": time.time(), "progress": behind}})}}
    def post(self, key, text):
        self.notes[key] = text
    def read(self, key):
        return self.notes.get(key)

def asleep_in_the_main_thread():
    time.sleep({seconds})

ledger = Ledger(4)
if {waiting}:
    ledger.entry("hvdext.test.wait", {ranks}).start([tf.constant(1)])
Watchdog(0, ledger, {store}, deadline=1.0).start()
asleep_in_the_main_thread()
"""


def _run(waiting, seconds, ranks=(0, 1, 2, 3), store=None):
    program = _PROGRAM.format(waiting=waiting, seconds=seconds, ranks=ranks, store=store)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)


def test_a_waiting_process_is_ended_with_a_verdict_and_its_stacks():
    ended = _run(waiting=True, seconds=60)
    assert ended.returncode == EXIT_CODE == 124
    verdict_text, stacks = ended.stderr.split("HVDEXT_DEADLINE=seconds", 1)
    assert "rank 0 has waited 1 s in collective 'hvdext.test.wait', step 1" in verdict_text
    assert "Which ranks are missing is not known" in verdict_text
    assert "asleep_in_the_main_thread" in stacks


def test_only_members_of_the_process_set_are_accused():
    ended = _run(waiting=True, seconds=60, ranks=(0, 2), store="KeyValueStore()")
    assert ended.returncode == EXIT_CODE
    assert "in collective 'hvdext.test.wait of ranks [0, 2]', step 1" in ended.stderr
    assert "rank 2 has not arrived: it has started this collective 0 times" in ended.stderr
    for stranger in (1, 3):
        assert f"rank {stranger} has" not in ended.stderr


def test_among_all_ranks_every_missing_one_is_accused():
    ended = _run(waiting=True, seconds=60, store="KeyValueStore()")
    for other in (1, 2, 3):
        assert f"rank {other} has not arrived" in ended.stderr


def test_a_process_that_does_not_wait_is_left_alone():
    assert _run(waiting=False, seconds=3).returncode == 0


# -- in elastic jobs -------------------------------------------------------------------------------------


class _Board(_Notes):
    def post(self, key, text):
        self._texts[key] = text


@pytest.fixture
def ended(monkeypatch):
    """What a watchdog would have ended its process with."""
    texts = []
    monkeypatch.setattr("hvdext.comm.watchdog._end", texts.append)
    return texts


def _notes(**started):
    return {
        rank.removeprefix("rank"): json.dumps({"time": 0.0, "progress": {NAME: [count, count]}})
        for rank, count in started.items()
    }


def _waiting(rank, store, elastic=True):
    ledger = Ledger(3)
    ledger.entry(NAME, (0, 1, 2))
    return Watchdog(rank, ledger, store, deadline=10.0, elastic=elastic)


def test_the_missing_rank_is_asked_to_end_and_does(ended, capfd):
    store = _Board(_notes(rank0=3, rank1=2, rank2=3))
    _waiting(0, store)._overdue(NAME, 3, 11.0)
    assert ended == []
    assert "rank 0 has waited 11 s for rank 1 in collective" in capfd.readouterr().err
    _waiting(2, store)._heed()
    assert ended == []
    _waiting(1, store)._heed()
    (text,) = ended
    assert f"ending this process, rank 1: rank 0 has waited 11 s for rank 1 in collective '{NAME}'" in text


def test_a_request_from_an_earlier_life_is_not_meant(ended):
    store = _Board({"end.1": "rank 0 has waited"})
    watchdog = _waiting(1, store)
    watchdog.start()
    watchdog.stop()
    watchdog._heed()
    assert ended == []


def test_a_rank_that_does_not_end_leaves_no_choice(ended):
    watchdog = _waiting(0, _Board(_notes(rank0=3, rank1=2, rank2=3)))
    watchdog._overdue(NAME, 3, 11.0)
    watchdog._overdue(NAME, 3, 40.0)
    (text,) = ended
    assert "rank 1 has not arrived" in text


@pytest.mark.parametrize(
    ("elastic", "notes"),
    [(False, {"rank1": 2, "rank2": 3}), (True, {"rank1": 3, "rank2": 3})],
    ids=["not elastic", "nobody is missing"],
)
def test_nobody_else_is_asked(ended, elastic, notes):
    store = _Board(_notes(rank0=3, **notes))
    _waiting(0, store, elastic)._overdue(NAME, 3, 11.0)
    assert len(ended) == 1
    assert [store.read(f"end.{rank}") for rank in range(3)] == [None] * 3
