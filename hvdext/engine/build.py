"""Builds Horovod for the TensorFlow of this interpreter, once, and installs it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from hvdext.engine import cache, fixes, headers, record, toolchain
from hvdext.engine.errors import EngineError
from hvdext.engine.progress import run_logged
from hvdext.engine.target import (
    HOROVOD_VERSION,
    Options,
    Target,
    TensorFlowInstall,
    current_target,
    find_tensorflow,
)


def build_horovod(
    *, with_mpi: bool = False, with_nccl: bool = False, force: bool = False, install: bool = True
) -> Path | None:
    """Makes sure that this interpreter has the engine that hvdext wants.

    Does nothing if it is installed, takes the wheel from the cache if it was built before, and
    otherwise builds it, which takes minutes.

    Args:
        with_mpi: build MPI in, besides Gloo; needs an MPI with its compilers.
        with_nccl: build NCCL in for tensors on GPUs; needs CUDA and NCCL.
        force: build and install again even if it is there.
        install: put it into this interpreter's environment; otherwise only into the cache.

    Returns:
        The wheel, or None if the engine was installed already.

    Raises:
        EngineError: if it cannot be built or installed; the message says why.
    """
    tensorflow = find_tensorflow()
    options = Options(mpi=with_mpi, nccl=with_nccl)
    target = current_target(tensorflow.version, options, toolchain.mpi_identity() if with_mpi else "")
    if install and not force and is_installed(target):
        _say(f"This engine is installed already: {target.key}")
        return None
    wheel = None if force else cache.cached_wheel(target)
    if wheel is None:
        wheel = _build(target, tensorflow)
    _say(f"Wheel: {wheel}")
    if install:
        install_wheel(wheel)
    return wheel


def is_installed(target: Target) -> bool:
    """Tells whether the installed Horovod is exactly this one."""
    installed = record.installed_record()
    return installed is not None and installed.get("key") == target.key


def install_wheel(wheel: Path) -> None:
    """Installs a wheel of the engine in place of any other Horovod.

    Args:
        wheel: the file.

    Raises:
        EngineError: if pip refuses.
    """
    # The packages that Horovod needs at run time are requirements of hvdext itself.
    command = toolchain.pip("install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"pip could not install {wheel}:\n{done.stderr or done.stdout}")
    importlib.invalidate_caches()
    _say(f"Installed Horovod {HOROVOD_VERSION} into {sys.prefix}")


def prepare_source(source: Path, target: Target) -> None:
    """Applies the source fixes and adds the record of them.

    Args:
        source: the folder that holds Horovod's `setup.py`.
        target: what is being built.

    Raises:
        EngineError: if a fix does not match exactly once.
    """
    fixes.apply(source)
    record.write_record(source / "horovod", target)


def _build(target: Target, tensorflow: TensorFlowInstall) -> Path:
    toolchain.check_programs(target.options)
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _say(
        f"Building Horovod {HOROVOD_VERSION} for TensorFlow {tensorflow.version} with "
        f"{', '.join(target.options.transports)}; this takes some minutes."
    )
    log = cache.cache_folder(target) / f"build-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hvdext-engine-") as scratch_name:
        scratch = Path(scratch_name)
        tools, downloads = scratch / "tools", scratch / "downloads"
        downloads.mkdir()
        env = toolchain.tools_environment(tools)
        run_logged(
            toolchain.tools_command(tools),
            phase="[1/3] Getting the build tools",
            log=log,
            cwd=scratch,
            env=env,
        )
        run_logged(
            toolchain.download_command(downloads),
            phase="[2/3] Downloading Horovod's source",
            log=log,
            cwd=scratch,
            env=env,
        )
        source = _unpack(downloads, scratch)
        prepare_source(source, target)
        includes = headers.extra_include_dirs(tensorflow.include, scratch) if target.options.nccl else []
        wheels = scratch / "wheels"
        # Not through pip: its --no-build-isolation would leave the choice of build front end to
        # its version, and hide CMake's progress.
        run_logged(
            [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(wheels)],
            phase="[3/3] Compiling",
            log=log,
            cwd=source,
            env=toolchain.compile_environment(tools, target.options, includes, jobs),
        )
        wheel = cache.store(_only(wheels, "*.whl"), target)
    log.unlink(missing_ok=True)
    return wheel


def _unpack(downloads: Path, scratch: Path) -> Path:
    with tarfile.open(_only(downloads, "*.tar.gz")) as archive:
        # The filter refuses members outside the folder; the oldest Pythons here lack it.
        if hasattr(tarfile, "data_filter"):
            archive.extractall(scratch, filter="data")
        else:
            archive.extractall(scratch)
    return scratch / f"horovod-{HOROVOD_VERSION}"


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = [path.name for path in found]
        raise EngineError(f"{folder} must hold exactly one {pattern}. Received: {names}.")
    return found[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
