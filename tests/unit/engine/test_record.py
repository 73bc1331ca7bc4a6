"""What an engine says about itself, and what hvdext concludes from silence."""

import pytest

from hvdext.engine import record
from hvdext.engine.fixes import PROTECTIONS, STALL_CHECK, STATEFUL_OPS
from hvdext.engine.target import Options, Target

TARGET = Target("2.21.0", "cp311", "linux_x86_64", Options(mpi=True), "0" * 64)


@pytest.fixture
def horovod(monkeypatch, tmp_path):
    """An empty package in the place of the installed Horovod."""
    monkeypatch.setattr(record, "horovod_folder", lambda: tmp_path)
    return tmp_path


def test_record_round_trip(horovod):
    record.write_record(horovod, TARGET)

    found = record.installed_record()
    assert found["key"] == TARGET.key
    assert found["tensorflow"] == "2.21.0"
    assert found["transports"] == ["gloo", "mpi"]
    assert record.installed_fixes() >= {"gloo-stall-check", "stateful-ops"}
    assert record.missing_protections() == []


def test_the_record_is_python(horovod):
    record.write_record(horovod, TARGET)
    namespace = {}
    exec((horovod / record.RECORD_FILE).read_text(), namespace)

    assert namespace["RECORD"] == record.installed_record()


def test_an_engine_with_one_fix_lacks_the_other(horovod):
    record.write_record(horovod, TARGET, fixes=(STALL_CHECK,))

    assert record.installed_fixes() == {STALL_CHECK.name}
    assert record.missing_protections() == [STATEFUL_OPS.without]


def test_an_engine_of_somebody_else_lacks_all(horovod):
    assert record.installed_record() is None
    assert record.installed_fixes() == frozenset()
    assert record.missing_protections() == [fix.without for fix in PROTECTIONS]


def test_a_damaged_record_counts_as_none(horovod):
    (horovod / record.RECORD_FILE).write_text("RECORD = {")

    assert record.installed_fixes() == frozenset()


def test_without_horovod_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(record, "horovod_folder", lambda: None)

    assert record.installed_fixes() == frozenset()
    assert record.missing_protections() == []


def test_what_concerns_gloo_alone_is_not_missing_under_mpirun(horovod, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")

    assert record.missing_protections() == [STATEFUL_OPS.without]
