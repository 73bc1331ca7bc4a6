"""The report of `make bench`: its numbers are those of the programs, and others' computing stops it."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("suite")


def test_what_a_program_finds_is_in_the_report(suite, monkeypatch, tmp_path):
    program = tmp_path / "finds.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nfrom measuring import figure\n"
        "figure('sum of two', [3.0, 1.0, 2.5], 'ms')\n"
    )
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "wait_until_quiet", lambda: 0.02)
    found = suite.measured("finds.py", "", tmp_path)
    assert found["figures"] == [
        {"what": "sum of two", "unit": "ms", "median": 2.5, "values": [3.0, 1.0, 2.5]}
    ]
    assert found["printed"] == ["sum of two: 2.500 ms (1.000 to 3.000, 3 measurements)"]
    page = suite.as_markdown({"machine": {"processor": "one"}, "benchmarks": {"sums": found}})
    assert "- processor: one" in page
    assert "`python benchmarks/finds.py`" in page
    assert "2% of the processors were taken by others" in page
    assert "| sum of two | 2.5 | 1 | 3 | 3 | ms |" in page
    json.dumps(found)


def test_a_program_that_fails_ends_the_suite(suite, monkeypatch, tmp_path):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "wait_until_quiet", lambda: 0.0)
    with pytest.raises(SystemExit, match=r"fails\.py.* failed with exit code 3"):
        suite.measured("fails.py", "", tmp_path)


def test_nothing_is_reported_while_others_compute(suite, monkeypatch):
    machine = importlib.import_module("machine")
    monkeypatch.setattr(machine, "busy", lambda: 0.7)
    with pytest.raises(SystemExit, match="70% of its processors are taken"):
        machine.wait_until_quiet(limit=0.0)
    monkeypatch.setattr(machine, "busy", lambda: 0.05)
    assert machine.wait_until_quiet(limit=0.0) == 0.05


def test_every_benchmark_of_a_suite_exists_and_takes_its_arguments(suite):
    for name, benchmark in suite.BENCHMARKS.items():
        text = (BENCHMARKS / benchmark.program).read_text()
        for arguments in (benchmark.quick, benchmark.full):
            for word in (arguments or "").split():
                assert not word.startswith("--") or f'"{word}"' in text, (name, word)
