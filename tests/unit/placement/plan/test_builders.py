"""Functions that build models as users write them: they compile, clear the session, number their layers."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.keras_tools.deferred import has_value, without_values
from hvdext.keras_tools.functional import skeleton
from hvdext.testing import run_ranks

L = keras.layers


def stack():
    return keras.Sequential([keras.Input((6,)), L.Dense(8, name="a"), L.Dense(1, name="b")], name="stack")


def compiling():
    model = stack()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
    return model


def test_a_plan_of_a_builder_that_compiles():
    plan = hvd.plan(compiling, 2)
    assert plan.stages == hvd.plan(stack, 2).stages
    assert plan.slots == hvd.plan(compiling(), 2).slots == 1


def test_a_pipeline_of_a_builder_that_compiles():
    def program(comm):
        with pytest.raises(
            ValueError, match=r"compile what hvd\.pipeline returns\. .*which compiles 'stack'"
        ):
            hvd.pipeline(compiling, hvd.plan(compiling, 2), 2)
        return True

    assert run_ranks(2, program) == [True, True]


def test_variables_made_of_values():
    class Fixed(L.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.scale = keras.Variable(np.array([3.0, 2.0]), name="scale")

        def call(self, x):
            return x * self.scale

    def build():
        return keras.Sequential([keras.Input((2,)), Fixed(name="fixed"), L.Identity(name="end")])

    def program(comm):
        model = hvd.pipeline(build, hvd.plan(build, 2, pins={"end": 1}), 1)
        return model.predict(np.ones((1, 2)), verbose=0)

    for found in run_ranks(2, program):
        np.testing.assert_array_equal(found, [[3.0, 2.0]])


def test_a_session_that_is_cleared_allocates_nothing():
    def cleared():
        keras.utils.clear_session(free_memory=False)
        first = L.Dense(4, name="first")
        keras.backend.clear_session(free_memory=False)
        return keras.Sequential([keras.Input((3,)), first, L.Dense(2)])

    for _ in range(2):
        model = skeleton(cleared)
        assert not any(map(has_value, model.variables))
    assert has_value(keras.Variable([1.0]))  # as before, outside


def test_keras_is_as_it_was_afterwards():
    from keras.src.backend.common import global_state

    before = global_state.get_global_attribute, keras.Variable.__init__
    with without_values(), without_values():
        assert global_state.get_global_attribute is not before[0]
    assert (global_state.get_global_attribute, keras.Variable.__init__) == before


@keras.saving.register_keras_serializable("hvdext_tests")
class Backbone(keras.Model):
    """As libraries write them: operations and layers without a name, and a configuration of its own."""

    def __init__(self, width, **kwargs):
        tokens = keras.Input((4, 6), name="tokens")
        x = L.Dense(width)(L.Dense(width, name="first")(tokens)) + 1.0
        super().__init__(tokens, L.Dense(width, name="pooled")(x[:, 0, :]), **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name, "trainable": self.trainable}


@pytest.mark.parametrize("way", ["pipeline", "place", "slices"])
def test_the_very_model_whose_copy_has_other_numbers(way):
    x = keras.Input((4, 6))
    model = keras.Model(x, L.Dense(2, name="head")(Backbone(8, name="backbone")(x)), name="net")
    asked = np.random.default_rng(0).normal(size=(4, 4, 6)).astype("float32")
    plan = hvd.plan(model, 2)

    def program(comm):
        if way == "place":
            made = hvd.place(model, plan, ["/CPU:0", "/CPU:0"])
        elif way == "slices":
            made = hvd.slice_layers(model, {"head": "column"})
        else:
            made = hvd.pipeline(model, plan, 2)
        return made.predict(asked, verbose=0), [v.path for v in made.weights]

    found, paths = run_ranks(1, program)[0]
    np.testing.assert_allclose(found, model(asked), atol=1e-5)
    assert paths == [v.path for v in model.weights]
