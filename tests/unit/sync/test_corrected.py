"""Synchronous model averaging as its paper writes it, against the same iteration in NumPy."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.testing import run_ranks

STEPS = 6


def _move(rank, step):
    """What a rank's own optimizer does to its weight at a step, from 1."""
    return np.sin(3.0 * rank + step)


def _by_hand(ranks, every, alpha, momentum):
    """Gradient and correction of one iteration are taken at the same weights, which begin equal."""
    weights, centre, before, history = np.zeros(ranks), 0.0, 0.0, []
    for step in range(1, STEPS + 1):
        due = step > 1 and (step - 1) % every == 0
        corrections = alpha * (weights - centre) if due else np.zeros(ranks)
        weights = weights + [_move(rank, step) for rank in range(ranks)] - corrections
        if due:
            centre, before = centre + corrections.sum() + momentum * (centre - before), centre
        history.append(weights)
    return np.transpose(history)


def _trained(ranks, *args, **kwargs):
    def run(comm):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.zeros((1, 1))])
        sync = hvd.sync.SMA(*args, **kwargs)
        sync.begin(model)
        seen = []
        for step in range(1, STEPS + 1):
            model.layers[0].kernel.assign_add([[_move(comm.rank, step)]])
            sync.step()
            seen.append(model.layers[0].kernel.numpy().item())
        sync.end()
        return seen

    return run_ranks(ranks, run)


@pytest.mark.parametrize(
    ("ranks", "every", "alpha", "momentum"),
    [(3, 1, None, 0.9), (2, 1, 0.2, 0.5), (2, 2, None, 0.0)],
)
def test_every_rank_s_weights(ranks, every, alpha, momentum):
    expected = _by_hand(ranks, every, 1 / ranks if alpha is None else alpha, momentum)
    np.testing.assert_allclose(_trained(ranks, every, alpha, momentum), expected, rtol=1e-5, atol=1e-6)


def test_the_settings():
    assert repr(hvd.sync.Corrected()) == "Corrected(alpha=None, momentum=0.9)"
    assert hvd.sync.Corrected(0.5) == hvd.sync.Corrected(0.5, 0.9) != hvd.sync.Corrected(0.5, 0.8)
    for options, message in (({"alpha": 0}, "`alpha` must"), ({"momentum": 1}, "`momentum` must")):
        with pytest.raises(ValueError, match=message):
            hvd.sync.SMA(**options)
    with pytest.raises(ValueError, match="must do without values that all ranks have in common"):
        hvd.sync.SMA(whom=hvd.sync.Pairs())
