"""One rank of a launch: calls `module:function` of `tests.multiprocess` and writes what it returns."""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np


def main(target):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(4)
    module, function = target.split(":")
    result = getattr(importlib.import_module(f"tests.multiprocess.{module}"), function)()
    rank = os.environ.get("HOROVOD_RANK", "0")
    Path(os.environ["TEST_RESULTS"], f"{rank}.json").write_text(json.dumps(result, default=_plain))


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value)} is no JSON")


if __name__ == "__main__":
    main(sys.argv[1])
