"""Whether the ranks of this job exchange through memory that they share."""

from __future__ import annotations

import ctypes
import importlib


def shared_memory() -> str:
    """What the engine says of it once it is initialised.

    "on"; "on within each of 2 hosts", or of how many there are; or "off: " and why. It is off where every
    rank is on a host, in a container or of a user of its own, and where one has `HVDEXT_LOCAL=0`. Then ranks
    exchange through Gloo.
    """
    package = importlib.import_module("horovod.tensorflow").__file__
    path = importlib.import_module("horovod.common.util").get_extension_full_path(package, "mpi_lib")
    try:
        tell = ctypes.CDLL(path).horovod_local_transport  # of the library that is loaded, not another one
    except AttributeError:
        return "off: this engine has none"
    tell.restype = ctypes.c_char_p
    return tell().decode()
