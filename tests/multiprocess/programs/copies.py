"""What a rank sees that is the copy of a process: all of it is its own."""

from __future__ import annotations

import os
import random
import sys

import numpy as np


def describe() -> dict:
    """Of this rank."""
    return {
        "arguments": sys.argv[1:],
        "rank": int(os.environ["HOROVOD_RANK"]),
        "asked by": os.environ["TEST_ASKED_BY"],
        "folder": os.getcwd(),
        "random": [random.random(), float(np.random.uniform())],
        "hash": hash("a name"),
        "process": os.getpid(),
        "engine": [name for name in ("horovod", "hvdext") if name in sys.modules],
    }
