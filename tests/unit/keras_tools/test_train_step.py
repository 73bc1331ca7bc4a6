"""What is put around a model's `train_step` comes off again, in any order."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest

from hvdext.keras_tools.models import retrace
from hvdext.keras_tools.train_step import around, trace_with


def model():
    made = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    made.compile("sgd", "mse", jit_compile=False)
    return made


def naming(name, calls):
    def wrapper(step):
        @functools.wraps(step)
        def named(data):
            calls.append(name)
            return step(data)

        return named

    return wrapper


def train(model):
    model.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0)


def test_it_leaves_nothing_behind():
    one, calls = model(), []
    undo = around(one, naming("a", calls))
    train(one)
    assert set(calls) == {"a"}
    undo()
    assert "train_step" not in vars(one)
    undo()  # once is enough


def test_a_step_of_the_users_own_comes_back():
    one, calls = model(), []
    mine = one.train_step = naming("mine", calls)(one.train_step)
    undo = around(one, naming("a", calls))
    undo()
    assert one.train_step is mine


def test_what_somebody_has_wrapped_stays_inside():
    """`functools.wraps` copies the attributes of what it wraps: it must not be taken for that."""
    one, calls = model(), []
    undo_inner = around(one, naming("inner", calls))
    undo_outer = around(one, naming("outer", calls))
    undo_inner()
    train(one)
    assert set(calls) == {"inner", "outer"}
    undo_outer()
    undo_inner()
    assert "train_step" not in vars(one)


def test_it_keeps_no_model_alive():
    one = model()
    undo, seen = around(one, naming("a", [])), weakref.ref(one)
    del one
    keras.utils.clear_session()
    gc.collect()
    assert seen() is None
    undo()


def test_a_wrapper_for_what_is_made_now_is_off_the_step_at_once():
    one, calls = model(), []
    trace_with(one, naming("a", calls))
    assert "train_step" not in vars(one)
    train(one)
    assert set(calls) == {"a"}
    calls.clear()
    retrace(one, "train")
    train(one)
    assert calls == []


@pytest.mark.parametrize("kinds", [(), ("train",), ("test", "predict")])
def test_retracing_makes_anew_what_was_made(kinds):
    one = model()
    one.make_train_function()
    one.make_test_function()
    train_function, test_function = one.train_function, one.test_function
    retrace(one, *kinds)
    assert (one.train_function is not train_function) == (kinds == () or "train" in kinds)
    assert (one.test_function is not test_function) == (kinds == () or "test" in kinds)
    assert one.predict_function is None  # not made before
