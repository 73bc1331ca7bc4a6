"""The command line: arguments, exit codes, errors."""

import json

import pytest

from hvdext import cli
from hvdext.engine import EngineError, build, doctor
from hvdext.engine.doctor import Finding, Report, Status

GOOD = Report((Finding("Horovod", Status.OK, "0.28.1"),))
BAD = Report((Finding("Horovod", Status.FAIL, "not installed", "run: hvdext build-horovod"),))


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])

    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["docter"])

    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "docter" in shown
    assert "doctor" in shown
    assert "build-horovod" in shown


@pytest.mark.parametrize(("report", "code"), [(GOOD, 0), (BAD, 1)])
def test_doctor_tells_by_its_exit_code(monkeypatch, capsys, report, code):
    monkeypatch.setattr(doctor, "examine", lambda: report)

    assert cli.main(["doctor"]) == code
    assert "Horovod" in capsys.readouterr().out


def test_doctor_as_json(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: BAD)

    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_build_passes_its_options_on(monkeypatch):
    received = {}
    monkeypatch.setattr(build, "build_horovod", lambda **options: received.update(options))

    assert cli.main(["build-horovod", "--with-mpi", "--no-install"]) == 0
    assert received == {"with_mpi": True, "with_nccl": False, "force": False, "install": False}


def test_a_failed_build_is_a_message_and_not_a_traceback(monkeypatch, capsys):
    def fail(**options):
        raise EngineError("Building Horovod needs a C++ compiler.")

    monkeypatch.setattr(build, "build_horovod", fail)

    assert cli.main(["build-horovod"]) == 1
    shown = capsys.readouterr().err
    assert shown == "hvdext build-horovod: error: Building Horovod needs a C++ compiler.\n"
