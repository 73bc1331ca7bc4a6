"""A worker's process whose models are NumPy's: it starts in a fraction of a second."""

import sys
import time

from serving_ranks import Model

from hvdext.inference.serving import worker_process


def load(path, stage, stages):
    assert "tensorflow" not in sys.modules
    return Model(before=lambda rows: time.sleep(0.002))


if __name__ == "__main__":
    worker_process.end(worker_process.main(load))
