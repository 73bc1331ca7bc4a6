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


def report_of_round_numbers():
    def figures(unit, medians):
        return [{"what": what, "unit": unit, "median": m, "values": [m, m]} for what, m in medians.items()]

    small = {
        f"allreduce of 10 numbers, 2 ranks, {way}": ms for way, ms in [("memory", 0.1), ("sockets", 0.4)]
    }
    large = {"allreduce of 40 MB, 2 ranks, memory, payload": 4.0}
    latency = figures("ms", small) + figures("GB/s", large)
    gradients = figures("images/s", {"hvdext, 2 ranks, per rank, without exchange": 8000.0}) + figures(
        "ratio", {"hvdext, 2 ranks, with over without": 0.9, "sockets, 2 ranks, with over without": 0.4}
    )
    rest = {"command": "", "seconds": 1, "taken by others before": 0.0, "printed": []}
    found = {"latency": rest | {"figures": latency}, "gradients": rest | {"figures": gradients}}
    return {"machine": {}, "benchmarks": found}


def test_the_cost_model_by_hand(suite):
    cost_model = importlib.import_module("cost_model")
    report = report_of_round_numbers()
    costs = cost_model.costs_of(report)
    assert costs.compute == pytest.approx(4e-3)
    # One host: 0.1 ms, and 8 MB at 4 GB/s. Five: 16 messages of 0.1 ms, and 2 * 4/5 of 8 MB at 1 GB/s more.
    assert costs.exchange(1, 8, 8e6, 1e9) == pytest.approx(0.1e-3 + 2e-3)
    assert costs.exchange(5, 8, 8e6, 1e9) == pytest.approx(2.1e-3 + 1.6e-3 + 12.8e-3)
    assert costs.exchange(5, 1, 8e6, 1e9) == pytest.approx(1.6e-3 + 12.8e-3)
    taken = 0.1e-3 + cost_model.GRADIENT_BYTES / 4e9
    assert costs.efficiency(1, 8, 1e9) == pytest.approx(4e-3 / (4e-3 + taken))
    assert costs.efficiency(1, 8, 1e9, every=10) == pytest.approx(4e-3 / (4e-3 + taken / 10))
    assert cost_model.measured_points(report) == {"through memory": 0.9, "through Gloo": 0.4}


def test_plots_stand_beside_the_report(suite, tmp_path):
    report = report_of_round_numbers()
    suite.draw_plots(report, tmp_path)
    page = suite.as_markdown(report)
    for name in ("latency", "gradients", "cost_model"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in page
