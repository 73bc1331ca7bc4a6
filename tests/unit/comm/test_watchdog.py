"""What the watchdog says, whom it accuses, and that it ends a process that waits."""

import json

import pytest
import tensorflow as tf

from hvdext.comm.ledger import Ledger
from hvdext.comm.watchdog import EXIT_CODE, Note, Watchdog, verdict
from tests.multiprocess.launching.launch import run_python

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


class _Board:
    """A store whose texts are given."""

    def __init__(self, texts):
        self._texts = texts

    def post(self, key, text):
        self._texts[key] = text

    def read(self, key):
        return self._texts.get(key)


class _Looks:
    """A watchdog that looks when it is told to, and keeps what it would have ended its process with."""

    def __init__(self, rank, ledger, store, deadline, **options):
        self.ended = []
        self._now = 0.0
        self._watchdog = Watchdog(
            rank, ledger, store, deadline, clock=lambda: self._now, end=self.ended.append, **options
        )
        self.start, self.stop = self._watchdog.start, self._watchdog.stop

    def at(self, *seconds):
        for self._now in seconds:
            self._watchdog.look()
        return self.ended


def test_a_join_waits_as_long_as_the_others_get_on():
    ledger = Ledger(2)
    ledger.entry("hvdext.join", (0, 1)).start([tf.constant(1)])
    store = {"1": '{"time": 1.0, "progress": {"hvdext.grad.sgd.0": [3, 2]}}'}
    watchdog = _Looks(0, ledger, _Board(store), 1.0)
    assert watchdog.at(0.0, 1.5) == []  # it has finished two since the wait began
    store["1"] = '{"time": 2.0, "progress": {"hvdext.grad.sgd.0": [4, 3]}}'
    assert watchdog.at(2.0, 3.0) == []
    (text,) = watchdog.at(4.5)  # and none since
    assert "rank 0 has waited 2 s in collective 'hvdext.join', step 1" in text


def test_a_join_does_not_wait_for_a_rank_that_tells_nothing():
    ledger = Ledger(2)
    ledger.entry("hvdext.join", (0, 1)).start([tf.constant(1)])
    store = {"1": '{"time": 1.0, "progress": {"hvdext.grad.sgd.0": [3, 2]}}'}
    watchdog = _Looks(0, ledger, _Board(store), 1.0)
    assert watchdog.at(0.0, 1.5) == []
    del store["1"]
    (text,) = watchdog.at(3.0)
    assert "rank 1 has not arrived: it has never reported" in text


ARRIVED = f'{{"time": 1.0, "progress": {{"{NAME}": [4, 3]}}}}'


def test_what_has_failed_in_a_graph_is_not_waited_for():
    """All have arrived, and this rank has been in another collective since."""
    ledger = _waiting_at(4)
    watchdog = _Looks(0, ledger, _Board({"1": ARRIVED, "2": ARRIVED}), 1.0)
    assert watchdog.at(0.0) == []
    other = ledger.entry("hvdext.test.other", (0, 1, 2))
    other.started.assign(1)
    other.finished.assign(1)
    assert watchdog.at(2.0, 4.0, 6.0) == []
    assert ledger.progress()[NAME] == (4, 4)


def test_an_engine_that_stalls_is_told_of():
    watchdog = _Looks(0, _waiting_at(4), _Board({"1": ARRIVED, "2": ARRIVED}), 1.0)
    (text,) = watchdog.at(0.0, 2.0)
    assert "All ranks have arrived; the engine or the network stalls." in text


@pytest.mark.parametrize("text", ['{"time": 1.0, "progress": {"hvdext.gr', "", None])
def test_a_note_cut_short_counts_as_none(text):
    whole = '{"time": 1.0, "progress": {"hvdext.grad.sgd.0": [3, 2]}}'
    (said,) = _Looks(0, _waiting_at(4), _Board({"1": text, "2": whole}), 1.0).at(0.0, 2.0)
    assert "rank 1 has not arrived: it has never reported" in said
    assert "rank 2 has not arrived: it has started this collective 3 times" in said


def _waiting_at(run):
    """The ledger of a rank that waits in the run of this number."""
    ledger = Ledger(3)
    entry = ledger.entry(NAME, (0, 1, 2))
    entry.started.assign(run)
    entry.finished.assign(run - 1)
    return ledger


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
    return run_python(program, timeout=90)


@pytest.mark.slow
def test_a_waiting_process_is_ended_with_a_verdict_and_its_stacks():
    ended = _run(waiting=True, seconds=60)
    assert ended.returncode == EXIT_CODE == 124
    verdict_text, stacks = ended.stderr.split("HVDEXT_DEADLINE=seconds", 1)
    assert "rank 0 has waited 1 s in collective 'hvdext.test.wait', step 1" in verdict_text
    assert "Which ranks are missing is not known" in verdict_text
    assert "asleep_in_the_main_thread" in stacks


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_process_that_does_not_wait_is_left_alone():
    assert _run(waiting=False, seconds=3).returncode == 0


# -- in elastic jobs -------------------------------------------------------------------------------------


def _notes(**started):
    return {
        rank.removeprefix("rank"): json.dumps({"time": 0.0, "progress": {NAME: [count, count]}})
        for rank, count in started.items()
    }


def _elastic(rank, store, ledger=None):
    return _Looks(rank, ledger or Ledger(3), store, deadline=10.0, elastic=True)


def test_the_missing_rank_is_asked_to_end_and_does(caplog):
    store = _Board(_notes(rank1=2, rank2=3))
    assert _elastic(0, store, _waiting_at(3)).at(0.0, 11.0) == []
    assert "rank 0 has waited 11 s for rank 1 in collective" in caplog.text
    assert "asking rank 1 to end" in caplog.text
    assert _elastic(2, store).at(11.0) == []
    (text,) = _elastic(1, store).at(11.0)
    assert f"ending this process, rank 1: rank 0 has waited 11 s for rank 1 in collective '{NAME}'" in text


def test_a_request_from_an_earlier_life_is_not_meant():
    store = _Board({"end.1": "rank 0 has waited"})
    watchdog = _elastic(1, store)
    watchdog.start()
    watchdog.stop()
    assert watchdog.at(1.0) == []


def test_a_rank_that_does_not_end_leaves_no_choice():
    watchdog = _elastic(0, _Board(_notes(rank1=2, rank2=3)), _waiting_at(3))
    assert watchdog.at(0.0, 11.0) == []
    (text,) = watchdog.at(40.0)
    assert "rank 1 has not arrived" in text


@pytest.mark.parametrize(
    ("elastic", "notes"),
    [(False, {"rank1": 2, "rank2": 3}), (True, {"rank1": 3, "rank2": 3})],
    ids=["not elastic", "nobody is missing"],
)
def test_nobody_else_is_asked(elastic, notes):
    store = _Board(_notes(**notes))
    assert len(_Looks(0, _waiting_at(3), store, 10.0, elastic=elastic).at(0.0, 11.0)) == 1
    assert [store.read(f"end.{rank}") for rank in range(3)] == [None] * 3
