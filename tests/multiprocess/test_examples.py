"""The examples run as their own first lines say, and their ranks end with the same weights."""

import re
from pathlib import Path

import pytest
from launch import launch_script

pytestmark = pytest.mark.multiprocess

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = [
    "average",
    "sum, learning rate / size",
    "adasum",
    "float16 on the wire",
    "2 micro-batches per update",
    "kernels only, biases local",
    "within pairs of ranks",
]


def _lines_of(script, *arguments):
    """What rank 0 printed."""
    ended = launch_script(2, EXAMPLES / script, *arguments, timeout=300)
    assert ended.exit_code == 0, ended.output
    start = "[0]<stdout>:"
    return [line.removeprefix(start) for line in ended.output.splitlines() if line.startswith(start)]


def _difference(lines):
    (found,) = [line for line in lines if "largest difference between" in line]
    return re.search(r"largest difference between .*?(\S+)$", found).group(1)


def test_train(tmp_path):
    lines = _lines_of("train.py", "--epochs", "2", "--output", str(tmp_path))
    assert _difference(lines) == "0.0"
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model.keras").read_bytes().startswith(b"PK")


def test_custom_loop():
    assert _difference(_lines_of("custom_loop.py")) == "0.0"


def test_gradient_options():
    rows = {line[:28].strip(): line[28:].split() for line in _lines_of("gradient_options.py")}
    assert [option for option in rows if option in OPTIONS] == OPTIONS
    for option in OPTIONS:
        accuracy, updates, sent, unit, apart = rows[option]
        assert float(accuracy) > 0.5
        assert int(updates) > 0
        assert float(sent) > 0
        assert unit == "KiB"
        # Local biases differ from rank to rank, everything else is the same.
        assert (float(apart) > 0) == (option == "kernels only, biases local")
    assert rows["average"][-1] == "0"
