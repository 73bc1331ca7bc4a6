"""The environment of the build."""

from pathlib import Path

import pytest

from hvdext.engine import toolchain
from hvdext.engine.errors import EngineError
from hvdext.engine.target import Options

TOOLS = Path("/tools")
PLAIN = Options()


def environment(options=PLAIN, include_dirs=()):
    return toolchain.compile_environment(TOOLS, options, list(include_dirs), jobs=2)


def test_plain_build_is_gloo_only(monkeypatch):
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    env = environment()

    assert env["HOROVOD_WITH_TENSORFLOW"] == "1"
    assert env["HOROVOD_WITH_GLOO"] == "1"
    assert env["HOROVOD_WITHOUT_MPI"] == "1"
    assert env["HOROVOD_CPU_OPERATIONS"] == "GLOO"
    assert "HOROVOD_GPU_OPERATIONS" not in env
    assert env["MAKEFLAGS"] == "-j2"


def test_mpi_keeps_gloo():
    env = environment(Options(mpi=True))

    assert env["HOROVOD_WITH_MPI"] == "1"
    assert env["HOROVOD_WITH_GLOO"] == "1"
    assert "HOROVOD_WITHOUT_MPI" not in env
    assert "HOROVOD_CPU_OPERATIONS" not in env


def test_nccl():
    assert environment(Options(nccl=True))["HOROVOD_GPU_OPERATIONS"] == "NCCL"


def test_the_shell_does_not_contradict_the_options(monkeypatch):
    monkeypatch.setenv("HOROVOD_WITHOUT_TENSORFLOW", "1")
    monkeypatch.setenv("HOROVOD_WITH_MPI", "1")
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    env = environment()

    assert "HOROVOD_WITHOUT_TENSORFLOW" not in env
    assert "HOROVOD_WITH_MPI" not in env
    assert "HOROVOD_GPU_OPERATIONS" not in env


def test_tools_and_headers_go_in_front(monkeypatch):
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/headers")
    env = environment(include_dirs=[Path("/a"), Path("/b")])

    assert env["PATH"] == "/tools/bin:/bin"
    assert env["PYTHONPATH"] == "/tools:/mine"
    assert env["CPLUS_INCLUDE_PATH"] == "/a:/b:/headers"


def test_the_source_package_is_pinned(tmp_path):
    toolchain.download_command(tmp_path)

    pinned = (tmp_path / "horovod.txt").read_text()
    assert pinned == f"horovod==0.28.1 --hash=sha256:{toolchain.HOROVOD_SHA256}\n"


def test_missing_programs_are_all_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(EngineError, match=r"no g\+\+ and no make .*apt-get install g\+\+ make"):
        toolchain.check_programs(PLAIN)


def test_mpi_needs_its_compiler(monkeypatch, tmp_path):
    for name in ("g++", "make"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    toolchain.check_programs(PLAIN)
    with pytest.raises(EngineError, match="apt-get install openmpi-bin libopenmpi-dev"):
        toolchain.check_programs(Options(mpi=True))


def test_mpi_is_told_by_its_compiler_and_version(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, text in (("mpicxx", "g++ -I/mpi/include\nmore"), ("mpirun", "mpirun (Some MPI) 4.1\nmore")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)

    assert toolchain.mpi_identity() == "g++ -I/mpi/include\nmpirun (Some MPI) 4.1"
