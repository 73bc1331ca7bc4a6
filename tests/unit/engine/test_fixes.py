"""The scripted edits: each matches exactly once, or nothing is written."""

from dataclasses import replace
from pathlib import Path

import pytest

from hvdext.engine import fixes
from hvdext.engine.fixes import FIXES, STALL_CHECK, STATEFUL_OPS, Edit, Fix, FixError


@pytest.fixture
def source(tmp_path):
    """A source tree in which every edit of `FIXES` fits."""
    for fix in FIXES:
        for edit in fix.edits:
            file = tmp_path / edit.file
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.write(f"// before\n{edit.old}    // after\n")
    return tmp_path


def contents(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_every_edit_is_made(source):
    fixes.apply(source)

    controller = (source / STALL_CHECK.edits[0].file).read_text()
    assert "global_ranks_.resize(size_);" in controller
    assert "reserve" not in controller
    ops = (source / STATEFUL_OPS.edits[0].file).read_text()
    assert ops.count(".SetIsStateful()") == len(STATEFUL_OPS.edits) == 11
    assert 'REGISTER_OP("HorovodAllreduce")\n    .SetIsStateful()\n' in ops


def test_new_files_are_added(source):
    fixes.apply(source)

    added = [file for fix in FIXES for file in fix.files]
    assert {Path(name).name for name, _ in added} >= {"local_transport.cc", "doorbell.cc"}
    assert all((source / name).read_text() == text for name, text in added)


def test_a_second_application_is_refused(source):
    fixes.apply(source)
    before = contents(source)

    with pytest.raises(FixError, match="0 occurrences"):
        fixes.apply(source, (STALL_CHECK,))

    assert contents(source) == before


def test_text_that_occurs_twice_changes_nothing(source):
    file = source / STALL_CHECK.edits[0].file
    file.write_text(file.read_text() * 2)
    before = contents(source)

    with pytest.raises(FixError, match=r"reserve.*exactly once. Received: 2 occurrences"):
        fixes.apply(source)

    assert contents(source) == before


def test_all_edits_that_do_not_fit_are_named(source):
    for fix in FIXES:
        (source / fix.edits[0].file).write_text("")

    with pytest.raises(FixError) as error:
        fixes.apply(source)

    assert "HorovodJoin" in str(error.value)
    assert "gloo_controller.cc" in str(error.value)


def test_a_missing_file_is_named(source):
    (source / STALL_CHECK.edits[0].file).unlink()

    with pytest.raises(FixError, match=r"gloo_controller\.cc"):
        fixes.apply(source)


def test_two_edits_of_one_text_are_refused(tmp_path):
    (tmp_path / "a.cc").write_text("x\n")
    edit = Edit(file="a.cc", old="x", new="y")
    twice = Fix(name="twice", why="", edits=(edit, edit))

    with pytest.raises(FixError, match="one fix only"):
        fixes.apply(tmp_path, (twice,))


def test_digest_changes_with_any_edit_and_file():
    other = Fix(
        name=STALL_CHECK.name,
        why=STALL_CHECK.why,
        edits=(Edit(STALL_CHECK.edits[0].file, STALL_CHECK.edits[0].old, "something else"),),
    )

    more = replace(STALL_CHECK, files=(("a.cc", "int a;"),))

    assert fixes.digest() == fixes.digest(FIXES)
    assert len({fixes.digest(), *(fixes.digest((fix,)) for fix in (STALL_CHECK, other, more))}) == 4


def test_names_are_unique():
    assert len({fix.name for fix in FIXES}) == len(FIXES)


def test_what_only_helps_compiling_is_no_protection():
    assert {fix.name for fix in fixes.PROTECTIONS} == {"gloo-stall-check", "stateful-ops"}
