"""What the watchdog says, and that it ends a process that waits."""

import subprocess
import sys

from hvdext.watchdog import EXIT_CODE, Note, verdict

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


_PROGRAM = """
import time
from hvdext.ledger import Ledger
from hvdext.watchdog import Watchdog
import tensorflow as tf
ledger = Ledger()
if {waiting}:
    ledger.entry("hvdext.test.wait").start([tf.constant(1)])
Watchdog(0, 2, ledger, None, deadline=0.5).start()
time.sleep({seconds})
"""


def _run(**values):
    program = _PROGRAM.format(**values)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)


def test_a_waiting_process_is_ended():
    ended = _run(waiting=True, seconds=60)
    assert ended.returncode == EXIT_CODE
    assert "rank 0 has waited" in ended.stderr
    assert "'hvdext.test.wait', step 1" in ended.stderr


def test_a_process_that_does_not_wait_is_left_alone():
    assert _run(waiting=False, seconds=2).returncode == 0
