"""What an engine is built for, and the name of its place in the cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdext.engine import fixes
from hvdext.engine.errors import EngineError

HOROVOD_VERSION = "0.28.1"

# Raise it when the build itself changes (header fixes, compiler environment), which no other part
# of the key shows.
RECIPE = 1

# Variables of the user's shell that change what the compiler makes of the same source.
BUILD_VARIABLES = (
    "CC",
    "CXX",
    "CXXFLAGS",
    "HOROVOD_ALLOW_MIXED_GPU_IMPL",
    "HOROVOD_BUILD_ARCH_FLAGS",
    "HOROVOD_BUILD_CUDA_CC_LIST",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_DEBUG",
    "HOROVOD_GPU",
    "HOROVOD_NCCL_HOME",
    "HOROVOD_NCCL_INCLUDE",
    "HOROVOD_NCCL_LIB",
    "HOROVOD_NCCL_LINK",
    "HOROVOD_ROCM_HOME",
)


@dataclass(frozen=True)
class TensorFlowInstall:
    """The TensorFlow of this interpreter, found without importing it.

    Attributes:
        version: as its package metadata gives it.
        include: the folder of its C++ headers.
    """

    version: str
    include: Path


@dataclass(frozen=True)
class Options:
    """What the engine is built with besides TensorFlow and Gloo.

    Attributes:
        mpi: MPI as a second controller and transport; needs an MPI with its compilers.
        nccl: NCCL for tensors on GPUs; needs CUDA and NCCL.
    """

    mpi: bool = False
    nccl: bool = False

    @property
    def transports(self) -> tuple[str, ...]:
        """Names of what carries data between ranks."""
        return ("gloo", *(["mpi"] if self.mpi else []), *(["nccl"] if self.nccl else []))


@dataclass(frozen=True)
class Target:
    """Everything that decides which binary a build makes.

    Attributes:
        tensorflow: version of TensorFlow.
        python: implementation and version as in wheel names, e.g. `cp311`.
        platform: operating system and processor, e.g. `linux_x86_64`.
        options: what is built in.
        fixes: digest of the source fixes.
        environment: the compiler settings of the user's shell, as sorted pairs, and which MPI is built in.
        horovod: version of Horovod.
        recipe: version of the build's own steps.
    """

    tensorflow: str
    python: str
    platform: str
    options: Options
    fixes: str
    environment: tuple[tuple[str, str], ...] = ()
    horovod: str = HOROVOD_VERSION
    recipe: int = RECIPE

    @property
    def key(self) -> str:
        """Name of the cache folder: readable in front, exact at the end."""
        exact = hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]
        transports = "+".join(self.options.transports)
        return (
            f"horovod-{self.horovod}-tf{self.tensorflow}-{self.python}-{self.platform}-{transports}-{exact}"
        )


def find_tensorflow() -> TensorFlowInstall:
    """Finds TensorFlow's version and headers without the seconds an import takes.

    Raises:
        EngineError: if this interpreter has no TensorFlow, or one without headers.
    """
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(
            "Horovod is built for the TensorFlow that is installed, so TensorFlow must be "
            f"installed first: {sys.executable} -m pip install tensorflow"
        )
    include = Path(spec.submodule_search_locations[0]) / "include"
    if not include.is_dir():
        raise EngineError(f"TensorFlow must come with its C++ headers. Received: no {include}.")
    return TensorFlowInstall(version=_tensorflow_version(), include=include)


def current_target(tensorflow: str, options: Options, mpi: str = "") -> Target:
    """Returns the target of a build by this interpreter in this shell.

    Args:
        tensorflow: version of the TensorFlow to build for.
        options: what to build in.
        mpi: what tells this MPI from another; an engine built with one does not work with the next.
    """
    settings = _build_environment(os.environ)
    return Target(
        tensorflow=tensorflow,
        python=f"{_implementation()}{sys.version_info.major}{sys.version_info.minor}",
        platform=sysconfig.get_platform().replace("-", "_").replace(".", "_"),
        options=options,
        fixes=fixes.digest(),
        environment=(*settings, ("MPI", mpi)) if mpi else settings,
    )


def _implementation() -> str:
    return "cp" if sys.implementation.name == "cpython" else sys.implementation.name


def _build_environment(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, environ[name]) for name in BUILD_VARIABLES if environ.get(name))


def _tensorflow_version() -> str:
    """The distribution is not always called tensorflow (tensorflow-cpu, tf-nightly)."""
    try:
        return importlib.metadata.version("tensorflow")
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get("tensorflow", [])
    if not names:
        raise EngineError(
            "TensorFlow must be installed as a package with metadata, so that its version is "
            "known. Received: a module named tensorflow that no package owns."
        )
    return importlib.metadata.version(names[0])
