"""The report: a pure function of the facts."""

import json
from dataclasses import replace

import pytest

from hvdext.engine.doctor import Facts, Status, as_json, as_text, diagnose
from hvdext.engine.fixes import STALL_CHECK, STATEFUL_OPS
from hvdext.engine.probe import ProbeResult

WELL = Facts(
    hvdext="0.1.0",
    python="3.11.7 (/venv/bin/python)",
    system="Linux",
    packages={
        "tensorflow": {"version": "2.21.0"},
        "keras": {"version": "3.15.1", "backend": "tensorflow"},
        "horovod": {"version": "0.28.1", "built": ["gloo"]},
    },
    horovod_present=True,
    record={"fixes": [STALL_CHECK.name, STATEFUL_OPS.name], "tensorflow": "2.21.0"},
    horovodrun="/venv/bin/horovodrun",
    scripts="/venv/bin",
    probes={"gloo": ProbeResult(True, 5.0, "size 2, sum [3.0, 30.0]")},
)


def with_package(name, **found):
    return replace(WELL, packages={**WELL.packages, name: found})


def the(report, subject):
    (finding,) = [item for item in report.findings if item.subject == subject]
    return finding


def test_all_is_well():
    report = diagnose(WELL)

    assert report.ok
    assert all(item.status is Status.OK and not item.advice for item in report.findings)
    assert as_text(report).endswith("Everything works.")


def test_no_horovod():
    facts = replace(
        with_package("horovod", error="ModuleNotFoundError"),
        horovod_present=False,
        record=None,
        probes={},
    )
    report = diagnose(facts)

    assert not report.ok
    assert the(report, "Horovod").advice == "run: hvdext build-horovod"
    assert "-> run: hvdext build-horovod" in as_text(report)


def test_no_horovod_and_no_compiler():
    facts = replace(WELL, horovod_present=False, missing_programs=("g++", "make"))

    advice = the(diagnose(facts), "Horovod").advice

    assert "apt-get install g++ make" in advice
    assert advice.endswith("run: hvdext build-horovod")


def test_horovod_for_another_tensorflow():
    facts = replace(
        with_package("horovod", error="ImportError: undefined symbol"),
        record={**WELL.record, "tensorflow": "2.20.0"},
    )
    finding = the(diagnose(facts), "Horovod")

    assert finding.status is Status.FAIL
    assert "built for TensorFlow 2.20.0, 2.21.0 is installed" in finding.advice


def test_horovod_of_somebody_else_works_with_notes():
    report = diagnose(replace(WELL, record=None))

    assert report.ok
    assert the(report, "engine fixes").status is Status.NOTE
    assert the(report, f"fix {STALL_CHECK.name}").advice == STALL_CHECK.without
    assert the(report, f"fix {STATEFUL_OPS.name}").status is Status.NOTE


def test_horovod_without_any_controller():
    assert not diagnose(with_package("horovod", version="0.28.1", built=["nccl"])).ok


@pytest.mark.parametrize(
    ("found", "subject", "advice"),
    [
        ({"error": "ModuleNotFoundError"}, "Keras", "pip install 'keras>=3'"),
        ({"version": "2.15.0", "backend": "tensorflow"}, "Keras", "pip install 'keras>=3'"),
        ({"version": "3.15.1", "backend": "jax"}, "Keras backend", "KERAS_BACKEND=tensorflow"),
    ],
)
def test_unusable_keras(found, subject, advice):
    report = diagnose(with_package("keras", **found))

    assert not report.ok
    assert advice in the(report, subject).advice


def test_no_tensorflow():
    report = diagnose(with_package("tensorflow", error="ModuleNotFoundError"))

    assert not report.ok
    assert "pip install tensorflow" in the(report, "TensorFlow").advice


def test_horovodrun_missing_or_foreign():
    missing = diagnose(replace(WELL, horovodrun=None))
    foreign = diagnose(replace(WELL, horovodrun="/usr/bin/horovodrun"))

    assert missing.ok
    assert "/venv/bin" in the(missing, "horovodrun").advice
    assert foreign.ok
    assert the(foreign, "horovodrun").status is Status.NOTE


def test_two_ranks_that_do_not_meet():
    report = diagnose(replace(WELL, probes={"gloo": ProbeResult(False, 120.0, "no result within 120 s")}))

    assert not report.ok
    assert "--network-interfaces" in the(report, "2 ranks, gloo").advice
    assert "Does not work: 1" in as_text(report)


def test_each_launcher_of_an_engine_with_mpi_is_tried():
    both = with_package("horovod", version="0.28.1", built=["gloo", "mpi"])
    both = replace(both, mpirun="/usr/bin/mpirun")
    assert not diagnose(both).ok  # MPI was not tried

    report = diagnose(replace(both, probes={**WELL.probes, "mpi": ProbeResult(True, 6.0, "sum")}))

    assert report.ok
    assert the(report, "mpirun").value == "/usr/bin/mpirun"
    assert the(report, "2 ranks, mpi").value == "allreduce in 6 s: sum"


def test_mpirun_is_not_for_an_engine_without_mpi():
    finding = the(diagnose(replace(WELL, mpirun="/usr/bin/mpirun")), "mpirun")

    assert "--with-mpi" in finding.value


@pytest.mark.parametrize(("built", "status"), [(["gloo", "mpi"], Status.NOTE), (["mpi"], Status.FAIL)])
def test_an_engine_with_mpi_wants_mpirun(built, status):
    finding = the(diagnose(with_package("horovod", version="0.28.1", built=built)), "mpirun")

    assert finding.status is status
    assert "openmpi-bin" in finding.advice


def test_json_holds_everything():
    report = diagnose(replace(WELL, horovodrun=None))

    found = json.loads(as_json(report))

    assert found["ok"] is True
    assert [item["subject"] for item in found["findings"]] == [item.subject for item in report.findings]
    assert {"ok", "note"} == {item["status"] for item in found["findings"]}
