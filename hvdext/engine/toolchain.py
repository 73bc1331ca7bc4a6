"""The programs and packages that a build of Horovod needs, kept out of the user's environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hvdext.engine.errors import EngineError
from hvdext.engine.target import HOROVOD_VERSION, Options

# The digest of the source package as its index publishes it; pip refuses any other file.
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# Horovod's set-up scripts date from 2023: CMake 4 refuses them, setuptools 70 and later drop what
# they use, and wheel 0.46 dropped what setuptools before 70 uses.
BUILD_REQUIREMENTS = (
    "setuptools>=68,<70",
    "wheel>=0.40,<0.46",
    "packaging",
    "cmake>=3.18,<4",
    "psutil",
    "cloudpickle",
    "pyyaml",
)


def check_programs(options: Options) -> None:
    """Checks that everything pip cannot install is there.

    Args:
        options: what to build in.

    Raises:
        EngineError: naming every missing program and how to get it.
    """
    compiler = os.environ.get("CXX", "g++")
    missing = [name for name in (compiler, "make") if shutil.which(name.split()[0]) is None]
    if missing:
        raise EngineError(
            "Building Horovod needs a C++ compiler and make. Received: no "
            f"{' and no '.join(missing)} on PATH. On Debian and Ubuntu: apt-get install g++ make"
        )
    if options.mpi and shutil.which("mpicxx") is None:
        raise EngineError(
            "Building MPI in needs an MPI with its compilers. Received: no mpicxx on PATH. On Debian and "
            "Ubuntu: apt-get install openmpi-bin libopenmpi-dev"
        )
    if importlib.util.find_spec("pip") is None:
        raise EngineError(
            f"Building Horovod needs pip in {sys.executable}. Received: no module named pip. "
            f"Try: {sys.executable} -m ensurepip"
        )


def mpi_identity() -> str:
    """Returns what tells one MPI from another: how its compiler compiles, and its version."""
    return "\n".join(_first_line(command) for command in (["mpicxx", "-show"], ["mpirun", "--version"]))


def pip(*arguments: str) -> list[str]:
    """Returns the command that runs this interpreter's pip."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def tools_command(folder: Path) -> list[str]:
    """Returns the command that installs the build tools into a folder of their own."""
    return pip("install", "--target", str(folder), *BUILD_REQUIREMENTS)


def download_command(folder: Path) -> list[str]:
    """Returns the command that puts Horovod's source package, and no other file, in a folder."""
    requirements = folder / "horovod.txt"
    requirements.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{HOROVOD_SHA256}\n", encoding="utf-8")
    return pip(
        "download",
        "--no-deps",
        "--no-build-isolation",  # pip asks the package for its metadata; the tools are there
        "--no-binary=horovod",
        f"--dest={folder}",
        f"--requirement={requirements}",
    )


def tools_environment(tools: Path) -> dict[str, str]:
    """Returns the user's environment with the build tools in front."""
    env = dict(os.environ)
    env["PATH"] = _prepend(str(tools / "bin"), env.get("PATH"))
    env["PYTHONPATH"] = _prepend(str(tools), env.get("PYTHONPATH"))
    env["PIP_USER"] = "0"  # a user-wide default of --user contradicts --target
    return env


def compile_environment(tools: Path, options: Options, include_dirs: list[Path], jobs: int) -> dict[str, str]:
    """Returns the environment in which Horovod's own set-up runs.

    Args:
        tools: where the build tools are.
        options: what to build in.
        include_dirs: folders to add to the compiler's include path.
        jobs: how many files to compile at a time, unless MAKEFLAGS is set already.
    """
    env = tools_environment(tools)
    # What the caller's shell says about frameworks and transports must not contradict `options`.
    for name in [name for name in env if name.startswith(("HOROVOD_WITH", "HOROVOD_GPU_"))]:
        del env[name]
    env.update(
        HOROVOD_WITH_TENSORFLOW="1",
        HOROVOD_WITHOUT_PYTORCH="1",
        HOROVOD_WITHOUT_MXNET="1",
        HOROVOD_WITH_GLOO="1",
    )
    if options.mpi:
        # Horovod's own default stays: who starts the ranks with MPI moves the data with MPI.
        env["HOROVOD_WITH_MPI"] = "1"
        env.pop("HOROVOD_CPU_OPERATIONS", None)
    else:
        env["HOROVOD_WITHOUT_MPI"] = "1"
        env["HOROVOD_CPU_OPERATIONS"] = "GLOO"
    if options.nccl:
        env["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    env.setdefault("MAKEFLAGS", f"-j{jobs}")
    if include_dirs:
        extra = os.pathsep.join(map(str, include_dirs))
        env["CPLUS_INCLUDE_PATH"] = _prepend(extra, env.get("CPLUS_INCLUDE_PATH"))
    return env


def _first_line(command):
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0]


def _prepend(first: str, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first
