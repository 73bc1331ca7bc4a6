"""What Keras reads of the metrics can be changed, once."""

import keras
import numpy as np

from hvdext.keras_tools.metrics import change_next_results, take_back

DATA = {"x": np.ones((2, 1)), "y": np.ones((2, 1)), "verbose": 0, "return_dict": True}


def model():
    made = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    made.compile("sgd", "mse", jit_compile=False)
    return made


def test_the_next_evaluation_returns_the_changed_results_and_no_other():
    one = model()
    before = set(vars(one))
    change_next_results(one, lambda logs: {"loss": logs["loss"] + 1})
    change_next_results(one, lambda logs: {"double": 2 * logs["loss"]})
    assert one.evaluate(**DATA) == {"loss": 2.0, "double": 4.0}
    assert one.evaluate(**DATA) == {"loss": 1.0}
    assert "_get_metrics_result_or_logs" not in set(vars(one)) - before


def test_who_waits_twice_is_called_once_and_can_be_taken_back():
    one, calls = model(), []

    def change(logs):
        calls.append(logs)
        return {}

    assert not take_back(one, change)
    change_next_results(one, change)
    change_next_results(one, change)
    one.evaluate(**DATA)
    assert len(calls) == 1
    assert not take_back(one, change)
    change_next_results(one, change)
    assert take_back(one, change)
    one.evaluate(**DATA)
    assert len(calls) == 1
