"""NumPy's numbers make the same answers as Python's: ranks compare answers by how they print."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.consensus.perturbation import Perturbation

whole, real = np.int64, np.float64

ANSWERS = {
    "Rotating": (hvd.sync.Rotating(whole(3)), hvd.sync.Rotating(3)),
    "Every": (hvd.sync.Every(whole(8)), hvd.sync.Every(8)),
    "Every, all": (hvd.sync.Every(whole(8), whole(2), np.uint8(3)), hvd.sync.Every(8, 2, 3)),
    "Always": (hvd.sync.Always(whole(4)), hvd.sync.Always(4)),
    "Adaptive, divergence": (
        hvd.sync.Adaptive(whole(2), whole(8), divergence=real(0.5), delay=whole(1)),
        hvd.sync.Adaptive(2, 8, divergence=0.5, delay=1),
    ),
    "Adaptive, overhead": (
        hvd.sync.Adaptive(2, 8, overhead=real(0.25)),
        hvd.sync.Adaptive(2, 8, overhead=0.25),
    ),
    "Pairs": (hvd.sync.Pairs(whole(7)), hvd.sync.Pairs(7)),
    "Hierarchical": (
        hvd.sync.Hierarchical(np.array([[0, 1], [2, 3]]), every=whole(2)),
        hvd.sync.Hierarchical([[0, 1], [2, 3]], every=2),
    ),
    "Pull": (hvd.sync.Pull(real(0.5), np.float32(0.25)), hvd.sync.Pull(0.5, 0.25)),
    "Pull, whole": (hvd.sync.Pull(whole(1)), hvd.sync.Pull(1.0)),
    "Outer": (
        hvd.sync.Outer(keras.optimizers.SGD(0.5), alpha=real(0.5)),
        hvd.sync.Outer(keras.optimizers.SGD(0.5), alpha=0.5),
    ),
    "Perturbation": (
        Perturbation(real(0.5), real(0.25), seed=whole(3)),
        Perturbation(0.5, 0.25, seed=3),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_numpys_numbers_are_pythons(name):
    numpys, pythons = ANSWERS[name]
    assert numpys == pythons
    assert repr(numpys) == repr(pythons)
