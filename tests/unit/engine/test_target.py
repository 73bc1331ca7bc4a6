"""The cache key: equal for equal engines, different for everything that changes the binary."""

import subprocess
import sys
from dataclasses import replace

import pytest

from hvdext.engine import target as target_module
from hvdext.engine.errors import EngineError
from hvdext.engine.target import Options, Target, current_target, find_tensorflow

BASE = Target(
    tensorflow="2.21.0",
    python="cp311",
    platform="linux_x86_64",
    options=Options(),
    fixes="a" * 64,
)


def test_key_is_readable():
    target = replace(BASE, options=Options(mpi=True))

    assert target.key.startswith("horovod-0.28.1-tf2.21.0-cp311-linux_x86_64-gloo+mpi-")


def test_equal_targets_have_equal_keys():
    assert replace(BASE).key == BASE.key


@pytest.mark.parametrize(
    "change",
    [
        {"tensorflow": "2.20.0"},
        {"python": "cp312"},
        {"platform": "linux_aarch64"},
        {"options": Options(mpi=True)},
        {"options": Options(nccl=True)},
        {"fixes": "b" * 64},
        {"environment": (("CXX", "clang++"),)},
        {"horovod": "0.28.2"},
        {"recipe": BASE.recipe + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_changes_the_key(change):
    assert replace(BASE, **change).key != BASE.key


def test_only_compiler_settings_of_the_shell_count(monkeypatch):
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "1")
    plain = current_target("2.21.0", Options())
    monkeypatch.setenv("CXX", "clang++")
    other = current_target("2.21.0", Options())

    assert ("CXX", "clang++") in other.environment
    assert all(name != "HOROVOD_CYCLE_TIME" for name, _ in plain.environment)
    assert plain.key != other.key


def test_another_mpi_is_another_engine():
    keys = {current_target("2.21.0", Options(mpi=True), mpi).key for mpi in ("4.1", "5.0")}

    assert len(keys) == 2


def test_no_tensorflow_says_what_to_install(monkeypatch):
    monkeypatch.setattr(target_module.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(EngineError, match="pip install tensorflow"):
        find_tensorflow()


def test_importing_the_engine_and_the_command_line_is_light():
    code = (
        "import sys, hvdext.engine, hvdext.cli\n"
        "print(sorted({'tensorflow', 'keras', 'horovod'} & set(sys.modules)))"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"
