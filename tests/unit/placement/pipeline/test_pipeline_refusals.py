"""What a pipeline would leave out or could not do again: an error on every rank, before a number is wrong."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks
from tests.multiprocess.programs import pipeline_cases as cases

L = keras.layers
X, Y = cases.plain_data(1)


def error_of(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def of_class(cls):
    """A function that builds a model of the class `cls`."""

    def build():
        x = keras.Input((6,), name="x")
        return cls(x, L.Dense(2, name="out")(L.Dense(4, name="hidden")(x)), name="own")

    return build


# -- methods of the model's class ----------------------------------------------------------------------------


class Scaled(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 3 * tf.reduce_mean((y - y_pred) ** 2)


class Stepping(keras.Model):
    def train_step(self, data):
        return {}

    def test_step(self, data):
        return {}


class Derived(Stepping):
    def helper(self):
        """Is no method of Keras'."""

    @property
    def metrics(self):
        return []


class Predicting(keras.Model):
    def predict(self, x, **options):
        return x


class Described(keras.Model):
    """Has nothing but what describes it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "anything"

    def get_config(self):
        return super().get_config()


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (Scaled, "Scaled.compute_loss"),
        (Derived, "Derived.metrics, Stepping.train_step, Stepping.test_step"),
        (Predicting, "Predicting.predict"),
    ],
)
@pytest.mark.parametrize("builds", [True, False])
def test_methods_that_a_pipeline_would_pass_over(cls, names, builds):
    build = of_class(cls)
    models = [build if builds else build() for _ in range(2)]
    plan = hvd.plan(models[0], 2)
    first, second = run_ranks(2, lambda comm: error_of(lambda: hvd.pipeline(models[comm.rank], plan, 2)))
    assert first == second
    assert first.startswith("ValueError: `model` must train and be asked as keras.Model does")
    assert first.endswith(f"Received: {cls.__name__} 'own' with {names}.")


def test_methods_that_describe_a_model_are_fine():
    build = of_class(Described)
    assert run_ranks(1, lambda comm: error_of(lambda: hvd.pipeline(build, hvd.plan(build, 2), 2))) == ["none"]


def test_a_step_on_the_object():
    model = of_class(keras.Model)()
    model.train_step = lambda data: {}
    plan = hvd.plan(model, 1)
    error = run_ranks(1, lambda comm: error_of(lambda: hvd.pipeline(model, plan, 2)))[0]
    assert "Received: Functional 'own' with own.train_step." in error
    assert "own.train_step" in error_of(lambda: hvd.place(model, plan))


class Constructed(keras.Model):
    def __init__(self, width=4, **kwargs):
        x = keras.Input((6,), name="x")
        super().__init__(x, L.Dense(width, name="out")(x), **kwargs)

    def evaluate(self, *args, **kwargs):
        return 0.0


class Stack(keras.Sequential):
    def compute_metrics(self, *args, **kwargs):
        return {}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Constructed(name="own"), "Constructed.evaluate"),
        (lambda: Stack([keras.Input((6,)), L.Dense(4, name="out")], name="own"), "Stack.compute_metrics"),
    ],
)
def test_methods_that_cut_models_would_lose(build, name):
    models = [build() for _ in range(2)]
    errors = run_ranks(
        2, lambda comm: error_of(lambda: hvd.slice_layers(models[comm.rank], {"out": "column"}))
    )
    for error in errors:
        assert error.startswith("ValueError: `model` must be of a class that Keras can make anew")
        assert f"'own' with {name}." in error
    if isinstance(models[0], Constructed):
        assert name in error_of(lambda: hvd.place(models[0], hvd.plan(models[0], 1)))


# -- layers that change after the cut ------------------------------------------------------------------------


def make(**options):
    model = hvd.pipeline(cases.plain, hvd.plan(cases.plain, places=hvd.size()), 2, **options)
    model.compile("adam", "mse")
    return model


def quantize(layers):
    layers[0].quantize("int8")


def add_lora(layers):
    layers[0].enable_lora(2)


@pytest.mark.slow
@pytest.mark.parametrize("change", [quantize, add_lora])
def test_a_layer_that_is_another_one(change, tmp_path):
    """On the rank of the last stage alone."""

    def program(comm):
        model = make()
        held = model.stages[0].held
        if comm.rank == 1:
            change(held)
        path = str(tmp_path / "whole.keras")
        return [
            error_of(lambda: model.save(path)),
            error_of(lambda: model.fit(X, Y, batch_size=16, verbose=0)),
            error_of(lambda: model.evaluate(X, Y, verbose=0)),
        ]

    first, second = run_ranks(2, program)
    assert first == second
    for error in first:
        assert "A pipeline's layers must stay as they were when it was cut" in error
        assert "Received: layer 'dense_2' with" in error
    assert not (tmp_path / "whole.keras").exists()


def test_layers_and_weights_from_elsewhere(tmp_path):
    def program(comm):
        model, other = make(), make()
        path = str(tmp_path / "whole.keras")
        if comm.rank == 0:
            model.more = L.Dense(1, name="more")
            model.more.build((None, 2))
            other.stages[0].held[0] = L.Dropout(0.5, name="new")
        return error_of(lambda: model.save(path)), error_of(lambda: other.save(path))

    for weights, layers in run_ranks(2, program):
        assert "the weights ['" in weights
        assert "the layers ['new']" in layers


def test_quantized_and_exported():
    model = run_ranks(1, lambda comm: make())[0]
    assert "must be quantized before it is cut" in error_of(lambda: model.quantize("int8"))
    assert "must be exported from its file" in error_of(lambda: model.export("never"))


@pytest.mark.slow
def test_what_was_frozen_is_frozen_in_the_file(tmp_path):
    """A whole stage on one rank, a variable on the other; after the optimizer was built."""
    path = str(tmp_path / "whole.keras")

    def program(comm):
        model = make()
        model.fit(X, Y, batch_size=16, verbose=0)
        if comm.rank == 0:
            model.trainable = False
        else:
            model.stages[0].held[-1].bias.trainable = False
        model.save(path)
        return cases.values(model)

    values = {}
    for part in run_ranks(2, program):
        values |= part
    whole = keras.models.load_model(path, compile=False)
    for key, value in cases.values(whole).items():
        np.testing.assert_array_equal(value, values[key])
    assert not whole.layers[0].trainable
    assert whole.get_layer("dense_2").trainable


# -- a second forward pass ----------------------------------------------------------------------


class RawNoise(L.Layer):
    def call(self, v, training=False):
        return v + tf.random.uniform(tf.shape(v)) if training else v


class SometimesNoise(L.Layer):
    def call(self, v, training=False):
        return tf.cond(tf.size(v) > 3, lambda: v + tf.random.normal(tf.shape(v)), lambda: v)


class GlobalNoise(L.Layer):
    """Drawn by Keras' own generator, which is no layer's."""

    def call(self, v, training=False):
        return v + keras.random.normal(keras.ops.shape(v))


class Counting(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.count = tf.Variable(0.0, trainable=False)

    def call(self, v):
        return v * self.count.assign_add(1.0)


class SeededNoise(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, v):
        return v + keras.random.normal(keras.ops.shape(v), seed=self.seeds)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (RawNoise, "RandomUniform in layer 'noise'"),
        (SometimesNoise, "RandomStandardNormal in layer 'noise'"),
        (GlobalNoise, "a variable that is no weight in layer 'noise'"),
        (Counting, "a variable that is no weight in layer 'noise'"),
        (SeededNoise, None),
        (lambda name: L.Dropout(0.5, name=name), None),
        (L.BatchNormalization, None),
    ],
)
def test_what_recompute_would_find_otherwise(layer, found):
    def program(comm):
        def build():
            stack = [L.Dense(4, name="first"), layer(name="noise"), L.Dense(1, name="last")]
            return keras.Sequential([keras.Input((3,)), *stack], name="noisy")

        plan = hvd.plan(build, 2, pins={"noise": 0})
        cut = lambda recompute: hvd.pipeline(build, plan, 2, recompute=recompute)  # noqa: E731
        return error_of(lambda: cut(True)), error_of(lambda: cut(False))

    for again, once in run_ranks(2, program):
        assert once == "none"
        if found is None:
            assert again == "none"
        else:
            assert "`recompute` must be False where layers draw or keep" in again
            assert f"Received: recompute=True, and {found}." in again


# -- data of one rank alone ----------------------------------------------------------------------


@pytest.mark.slow
def test_weights_of_classes_with_targets_on_the_last_rank_alone():
    weights = {0: 1.0, 1: 3.0}
    y = (X[:, 0] > 0).astype("int32")
    options = {"class_weight": weights}

    def build():
        seeds = [keras.initializers.GlorotUniform(seed) for seed in range(2)]
        stack = [L.Dense(4, "tanh", name="a", kernel_initializer=seeds[0])]
        stack.append(L.Dense(2, "softmax", name="b", kernel_initializer=seeds[1]))
        return keras.Sequential([keras.Input((6,)), *stack], name="classes")

    def trained(model, y):
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        loss = model.fit(X, y, batch_size=8, shuffle=False, verbose=0, **options).history["loss"][0]
        return loss, model.train_on_batch(X, y, **options)

    def program(comm):
        return trained(hvd.pipeline(build, hvd.plan(build, 2), 2), y if comm.rank == 1 else None)

    for found in run_ranks(2, program):
        np.testing.assert_allclose(found, trained(build(), y), rtol=1e-5)


def test_data_that_one_rank_cannot_read():
    def program(comm):
        model = make()
        rows = 16 if comm.rank == 0 else 12  # Keras: cardinality is ambiguous
        return [
            error_of(lambda: model.fit(X, Y[:rows], batch_size=4, verbose=0)),
            error_of(lambda: model.train_on_batch(None if comm.rank == 0 else X, Y)),
            error_of(lambda: model.test_on_batch(X, Y if comm.rank == 0 else None)),
        ]

    for first, second, third in run_ranks(2, program):
        assert "cardinality" in first
        assert "rank 1" in first
        assert second.startswith("ValueError: `x` must be given on the rank of the first stage")
        assert third.startswith("ValueError: `y` must be given on the rank of the last stage")


def test_a_builder_that_fails_on_one_rank():
    def program(comm):
        plan = hvd.plan(cases.plain, 2)

        def build():
            if comm.rank == 1:
                raise FileNotFoundError("vocabulary.txt")
            return cases.plain()

        return error_of(lambda: hvd.pipeline(build, plan, 2))

    for error in run_ranks(2, program):
        assert error.startswith("FileNotFoundError: hvd.pipeline could not cut the model:")
        assert "rank 1" in error
