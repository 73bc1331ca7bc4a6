"""A worker's process whose models are NumPy's: it starts in a fraction of a second."""

import sys
import time

from serving_ranks import Model

from hvdext.serving.worker import process


def load(path, stage, stages):
    assert "tensorflow" not in sys.modules
    return Model(before=lambda rows: time.sleep(0.002))


if __name__ == "__main__":
    process.end(process.main(load))
