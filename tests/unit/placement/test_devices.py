"""Models on several devices of one process, which TensorFlow must be told of before its first operation."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.multiprocess.launching.launch import forked_python

HERE = Path(__file__).parent
EXAMPLES = Path(__file__).parents[3] / "examples"


def _run(*command, timeout=240):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [*forked_python(), *map(str, command)]
    return subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True)


@pytest.mark.slow
def test_placed_models_are_the_same_models(tmp_path):
    ended = _run(HERE / "placed_programs.py", tmp_path / "problems.json")
    assert ended.returncode == 0, ended.stderr
    problems = json.loads((tmp_path / "problems.json").read_text())
    assert len(problems) == 12
    assert not any(problems.values()), "\n".join(f"{n}: {text}" for n, text in problems.items() if text)


@pytest.mark.slow
def test_the_example(tmp_path):
    ended = _run(EXAMPLES / "place_devices.py", "--epochs", "3", "--places", "3", "--output", tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    for place in range(3):
        (line,) = [line for line in lines if line.startswith(f"place {place} on /device:CPU:{place}: ")]
        assert int(line.split()[4]) > 0
    (line,) = [line for line in lines if line.startswith("test accuracy placed ")]
    placed, alone = (float(word.strip(",")) for word in (line.split()[3], line.split()[-1]))
    assert placed > 0.9
    assert abs(placed - alone) < 0.01
    assert {path.name for path in tmp_path.iterdir()} == {"plan.png", "plan.yaml", "placed.keras"}
