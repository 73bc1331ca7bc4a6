"""Long commands: the log, the percentage and the message of a failure."""

import os
import sys

import pytest

from hvdext.engine.errors import EngineError
from hvdext.engine.progress import excerpt, percent, run_logged


def run(code, log, cwd):
    run_logged([sys.executable, "-c", code], phase="Trying", log=log, cwd=cwd, env=dict(os.environ))


def test_output_goes_to_the_log_and_the_phase_to_the_screen(tmp_path, capsys):
    log = tmp_path / "log"
    run("print('hello')", log, tmp_path)

    assert "hello" in log.read_text()
    shown = capsys.readouterr().err
    assert "Trying" in shown
    assert "hello" not in shown


def test_a_failure_shows_the_end_of_the_log_and_its_place(tmp_path):
    log = tmp_path / "log"

    with pytest.raises(EngineError) as error:
        run("print('cause'); raise SystemExit(3)", log, tmp_path)

    assert "Trying failed with exit code 3" in str(error.value)
    assert "cause" in str(error.value)
    assert str(log) in str(error.value)


def test_an_error_far_above_the_end_is_shown(tmp_path):
    log = tmp_path / "log"
    log.write_text("a.cc:1: fatal error: b.h: No such file\n" + "more work\n" * 100)

    shown = excerpt(log)

    assert shown.startswith("  a.cc:1: fatal error: b.h")
    assert shown.count("more work") == 25


def test_percent_is_the_last_one():
    assert percent(b"[  3%] Building\n[ 45%] Building\nwarning: 99%\n") == 45
    assert percent(b"nothing yet\n") is None
