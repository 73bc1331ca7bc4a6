"""Scripts as the guides and examples of Keras have them, on two ranks: they equal one process."""

import numpy as np
import pytest

from tests.multiprocess.habits.every import HABITS

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("name", HABITS)
def test_two_ranks_are_one_process(name, results_of, reference):
    expected = reference[f"habit {name}"]
    assert "error" not in expected, expected["error"]
    first, second = results_of(2, f"habit {name}")
    for mine, other in zip(_arrays(first), _arrays(second), strict=True):
        np.testing.assert_array_equal(mine, other)
    for mine, alone in zip(_arrays(first), _arrays(expected["value"]), strict=True):
        np.testing.assert_allclose(mine, alone, rtol=1e-4, atol=1e-5)


def _arrays(result):
    """Everything a script has come to: weights, logs, what it has predicted."""
    rest = [result[key] for key in sorted(result) if key not in ("weights", "logs")]
    return [np.asarray(value) for value in (*result["weights"], *result["logs"].values(), *rest)]
