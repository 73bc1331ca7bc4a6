"""Environments of what hvdext is measured beside, made when first asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

_HERE = Path(__file__).resolve().parent.parent
_STOCK_BUILD = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_CPU_OPERATIONS": "GLOO",
    "MAKEFLAGS": f"-j{os.cpu_count()}",
}
_STOCK_TOOLS = (
    "setuptools<70",
    "wheel",
    "packaging",
    "psutil",
    "cloudpickle",
    "pyyaml",
    "cmake<4",
    "numpy<2",
)


def stock_python() -> Path:
    """The interpreter of an environment with stock Horovod 0.28.1 on Keras 2, TensorFlow 2.15."""
    if sys.version_info >= (3, 12):
        sys.exit("Stock Horovod needs Python 3.10 or 3.11: TensorFlow 2.15 exists for no later one.")

    def fill(python):
        _install(python, "tensorflow==2.15.1", *_STOCK_TOOLS)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        options = ("--no-build-isolation", "--no-cache-dir", "horovod==0.28.1")
        _install(python, *options, env=_STOCK_BUILD | {"PATH": path})

    return _environment(".venv-stock", "TensorFlow 2.15 and stock Horovod", fill)


def torch_python() -> Path:
    """The interpreter of an environment with PyTorch 2.13.0."""
    return _environment(
        ".venv-torch", "PyTorch", lambda python: _install(python, "torch==2.13.0", "numpy", "psutil")
    )


def _environment(name, what, fill):
    folder = _HERE / name
    python, finished = folder / "bin" / "python", folder / ".finished"
    if not finished.exists():
        print(f"making an environment with {what}; takes minutes, once ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        fill(python)
        finished.touch()
    return python


def _install(python, *packages, env=None):
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True, env=os.environ | (env or {}))
