"""Pipelines of threads against one process that trains the uncut model."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.keras_tools.functional import calls_of, skeleton
from hvdext.placement.pipeline.data import complete, microbatch_problem
from hvdext.placement.pipeline.stages import cut
from hvdext.testing import run_ranks
from tests.multiprocess.programs import pipeline_cases as cases

layers = keras.layers


def merged(ranks) -> dict:
    """All ranks' weights, each of which is on one rank only."""
    found = {}
    for weights in ranks:
        assert not found.keys() & weights.keys()
        found |= weights
    return found


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=tolerance, err_msg=path)


def _held(model) -> list:
    """Which of the whole model's variables have a value on this rank, as in `cases.values`."""
    held = [v.path for v in model.whole.model.variables if v._value is not None]
    return ["/".join(path.split("/")[-2:]) for path in held]


def make(builder=cases.plain, microbatches=2, schedule="1f1b", **options):
    return hvd.pipeline(builder, hvd.plan(builder, places=hvd.size()), microbatches, schedule, **options)


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "schedule", "recompute"), [(2, "1f1b", False), (2, "gpipe", True), (1, "1f1b", True)]
)
@pytest.mark.slow
def test_training_equals_one_process(ranks, schedule, recompute):
    """Skip connections past a stage, dropout, batch norm, penalties, several inputs and outputs."""

    def program(comm):
        plan = cases.branched_plan(hvd, 2)
        model = hvd.pipeline(cases.branched, plan, 4, schedule, recompute=recompute)
        model.compile(cases.OPTIMIZERS["adam"](), cases.BRANCHED_LOSS, metrics=[["accuracy"], ["mae"]])
        x, y = cases.branched_data()
        history = model.fit(x, y, batch_size=cases.ROWS, shuffle=False, verbose=0).history
        return history, cases.values(model)

    loss, expected = cases.branched_reference("adam")
    results = run_ranks(ranks, program)
    assert_close(merged([weights for _, weights in results]), expected)
    for history, _ in results:
        assert history == results[0][0]
        assert history["loss"][0] == pytest.approx(loss, rel=1e-5)
        assert set(history) == {"loss", "late_loss", "early_loss", "late_accuracy", "early_mae"}


class Turned(layers.Layer):
    """Complex numbers made of real ones, turned by a trained angle."""

    def build(self, shape):
        self.angle = self.add_weight(shape=shape[1:], initializer="ones", name="angle")

    def call(self, x):
        turn = tf.complex(tf.cos(self.angle), tf.sin(self.angle))
        return tf.complex(x, x * x) * turn


class Parts(layers.Layer):
    """Real and imaginary parts, weighted differently."""

    def call(self, z):
        return tf.math.real(z * z) + 3 * tf.math.imag(z)


@pytest.mark.slow
def test_gradients_of_complex_tensors():
    @cases.seeded
    def waves():
        stack = [layers.Dense(4, activation="tanh", name="dense"), Turned(name="turn"), Parts(name="parts")]
        return keras.Sequential([keras.Input((3,), name="x"), *stack], name="waves")

    x, y = np.random.default_rng(2).normal(size=(8, 3)), np.ones((8, 4))

    def trained(model):
        model.compile(keras.optimizers.SGD(0.005), "mse")
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return cases.values(model)

    plan = hvd.plan(waves, places=2, pins={"turn": 0, "parts": 1})
    results = run_ranks(2, lambda comm: trained(hvd.pipeline(waves, plan, 2)))
    assert_close(merged(results), trained(waves()), 1e-6)


@pytest.mark.slow
def test_recompute_makes_the_forward_pass_twice():
    passes = []

    def count(x):
        passes.append(keras.src.backend.get_stateless_scope() is not None)
        return x

    def program(comm, recompute):
        passes.clear()
        model = keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Lambda(count), layers.Dense(1)])
        model = make(model, microbatches=3, recompute=recompute)
        model.compile("sgd", "mse")
        passes.clear()
        model.fit(np.ones((3, 2)), np.ones((3, 1)), shuffle=False, verbose=0)
        return list(passes)

    assert run_ranks(1, program, False) == [[False] * 3]
    assert sorted(run_ranks(1, program, True)[0]) == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("reduction", "weighted"),
    [("sum_over_batch_size", True), ("sum", True), ("mean_with_sample_weight", True), ("mean", False)],
)
@pytest.mark.slow
def test_losses_count_as_in_one_batch(reduction, weighted):
    x, y = cases.plain_data(2)
    weights = np.random.default_rng(1).random(len(x)) if weighted else None
    options = {"batch_size": cases.ROWS, "shuffle": False, "verbose": 0, "sample_weight": weights}

    def compiled(model):
        loss = keras.losses.MeanSquaredError(reduction=reduction)
        model.compile(keras.optimizers.SGD(0.1), loss, weighted_metrics=["mae"])
        return model

    def program(comm):
        model = compiled(make(microbatches=4))
        return model.fit(x, y, **options).history, cases.values(model)

    whole = compiled(cases.plain())
    history = whole.fit(x, y, **options).history
    results = run_ranks(2, program)
    assert_close(merged([weights for _, weights in results]), cases.values(whole))
    for found, _ in results:
        assert {key: value[0] for key, value in found.items()} == pytest.approx(
            {key: value[0] for key, value in history.items()}, rel=1e-5
        )


@pytest.mark.slow
def test_a_generator_loses_no_batch():
    x, y = cases.plain_data(3)
    compiled = {"optimizer": "sgd", "loss": "mse"}

    def batches():
        for start in range(0, len(x), cases.ROWS):
            yield x[start : start + cases.ROWS], y[start : start + cases.ROWS]

    def program(comm):
        model = make()
        model.compile(**compiled)
        model.fit(batches(), steps_per_epoch=3, verbose=0)
        return cases.values(model)

    whole = cases.plain()
    whole.compile(**compiled)
    whole.fit(x, y, batch_size=cases.ROWS, shuffle=False, verbose=0)
    assert_close(merged(run_ranks(2, program)), cases.values(whole))


@pytest.mark.slow
def test_clipping_by_the_norm_over_all_stages():
    x, y = cases.plain_data(4)

    def trained(model, **clipping):
        model.compile(keras.optimizers.SGD(0.5, global_clipnorm=0.1), "mse")
        model.fit(x, y, batch_size=cases.ROWS, shuffle=False, verbose=0)
        return cases.values(model)

    # Stages that clip by norms of their own would make larger steps.
    assert_close(merged(run_ranks(2, lambda comm: trained(make()))), trained(cases.plain()), 1e-6)


@pytest.mark.slow
def test_clipping_by_the_norm_counts_repeated_rows_as_keras_does():
    @cases.seeded
    def reader():
        words = layers.Embedding(3, 4, name="words")
        stack = [words, layers.Flatten(name="flat"), layers.Dense(1, name="out")]
        return keras.Sequential([keras.Input((5,), dtype="int32"), *stack], name="reader")

    x, y = np.random.default_rng(3).integers(0, 3, (8, 5)), np.ones((8, 1))

    def trained(model):
        model.compile(keras.optimizers.SGD(1.0, global_clipnorm=0.1), "mse")
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return cases.values(model)

    assert_close(merged(run_ranks(2, lambda comm: trained(make(reader)))), trained(reader()), 1e-6)


@pytest.mark.slow
def test_all_stages_skip_an_overflow_together():
    @cases.seeded
    def mixed():
        policy = keras.DTypePolicy("mixed_float16")
        model = [layers.Dense(4, dtype=policy, name=f"dense_{i}") for i in range(3)]
        whole = keras.Sequential(
            [keras.Input((3,)), *model, layers.Dense(1, dtype="float32", name="out")], name="m"
        )
        whole.dtype_policy = policy
        return whole

    x = np.full((8, 3), 0.1, "float32")
    x[5] = 1e5  # more than float16 can hold, in the second batch

    def program(comm):
        plan = hvd.plan(mixed, places=2)
        model = hvd.pipeline(mixed, plan, 2)
        model.compile("sgd", "mse")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        weights = [model.get_weights()]
        for batch in (x[:4], x[4:]):
            model.fit(batch, np.zeros((4, 1)), batch_size=4, shuffle=False, verbose=0)
            weights.append(model.get_weights())
        changed = [not all(map(np.array_equal, a, b)) for a, b in itertools.pairwise(weights)]
        return changed, float(model.optimizer.dynamic_scale), float(model.optimizer.initial_scale)

    for changed, scale, before in run_ranks(2, program):
        assert changed == [True, False]
        assert scale == before / 2


@pytest.mark.slow
def test_a_stage_that_trains_nothing():
    def frozen():
        model = cases.plain()
        for name in ("dense_0", "dense_1"):
            model.get_layer(name).trainable = False
        return model

    x, y = cases.plain_data(2)

    def trained(model):
        model.compile(keras.optimizers.Adam(0.01, global_clipnorm=0.1), "mse")
        model.fit(x, y, batch_size=cases.ROWS, shuffle=False, verbose=0)
        return cases.values(model)

    def program(comm):
        plan = hvd.plan(frozen, places=2, pins={"dense_1": 0, "dense_2": 1})
        model = hvd.pipeline(frozen, plan, 2)
        return trained(model), int(model.optimizer.iterations), len(model.trainable_weights)

    results = run_ranks(2, program)
    assert_close(merged([weights for weights, _, _ in results]), trained(frozen()))
    assert [rest for _, *rest in results] == [[2, 0], [2, 4]]


# -- what a rank holds and sends ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rank_holds_its_stage_only_and_starts_as_the_whole_model():
    whole = cases.plain()
    start = cases.values(whole)

    def program(comm):
        model = make(lambda: cases.plain())
        values = cases.values(model)
        model.compile("adam", "mse")
        model.fit(*cases.plain_data(1), batch_size=cases.ROWS, verbose=0)
        held = _held(model)
        return values, held, sum(int(np.prod(v.shape)) for v in model.optimizer.variables)

    results = run_ranks(2, program)
    assert_close(merged([values for values, _, _ in results]), start, 0)
    for values, held, slots in results:
        assert held == list(values)
        assert slots == 2 + 2 * sum(value.size for value in values.values())


def test_values_that_the_builder_or_the_given_model_holds():
    given = cases.plain()
    for variable in given.weights:
        variable.assign(tf.random.normal(variable.shape))
    expected = cases.values(given)

    def builder():
        model = cases.plain()
        model.set_weights(given.get_weights())
        return model

    for model in (given, builder):
        assert_close(merged(run_ranks(2, lambda comm, m=model: cases.values(make(m)))), expected, 0)
    assert_close(cases.values(given), expected, 0)
    given.compile("sgd", "mse")
    assert_close(run_ranks(1, lambda comm: cases.values(make(given)))[0], expected, 0)
    assert given.compiled


def test_inputs_without_a_name_keep_their_layers_name():
    x = keras.Input((4,))
    given = keras.Model(x, layers.Dense(2)(layers.Dense(4)(x)))

    def program(comm):
        cut = hvd.slice_layers(given, {given.layers[1].name: "column"})
        return make(given).whole.calls.inputs, [layer.name for layer in cut.layers]

    names = [layer.name for layer in given.layers]
    assert run_ranks(2, program) == [((names[0],), names)] * 2


@pytest.mark.slow
def test_bytes_per_step_are_those_of_the_formula():
    """Stage 0 sends activations of 7 floats per row, stage 1 as many gradients; both share results."""

    def program(comm):
        plan = hvd.plan(cases.plain, places=2, pins={"dense_1": 0, "dense_2": 1})
        model = hvd.pipeline(cases.plain, plan, 4)
        model.compile("sgd", "mse", metrics=["mae"])
        x, y = cases.plain_data(1)
        model.fit(x, y, batch_size=cases.ROWS, verbose=0)
        before = hvd.traffic()["pipeline"].bytes
        model.fit(x, y, batch_size=cases.ROWS, verbose=0)
        return hvd.traffic()["pipeline"].bytes - before

    for sent in run_ranks(2, program):
        # Loss, overflow, a mean's total and count, three marks of each rank's batch; 2 (n - 1) / n of it.
        results = 8 * (2 + 2 + 3 * 2)
        assert sent == cases.ROWS * 7 * 4 + results


def test_tensors_that_go_past_a_stage():
    keras.utils.clear_session()  # Keras numbers what has no name
    chunks = cut(calls_of(skeleton(cases.branched)), cases.branched_plan(hvd, 4))
    first, second, third, last = ({p.name: p for p in chunk.gives} for chunk in chunks)
    assert set(first) == {"tokens", "first", "not_equal", "early"}
    assert set(second) == {"tokens", "not_equal", "early", "words", "drop", "shared@1"}
    assert set(third) == {"tokens", "early", "drop", "read", "block/inner_drop"}
    assert list(last) == ["late", "early"]
    assert [p.name for p in first.values() if p.has_gradient] == ["first", "early"]
    assert third["tokens"].spec.dtype == tf.int32
    assert chunks[1].takes == chunks[0].gives


# -- as a Keras model ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_and_predictions_of_any_number_of_rows():
    whole = cases.branched()
    whole.compile("sgd", cases.BRANCHED_LOSS, metrics=[["accuracy"], ["mae"]])
    x, y = cases.branched_data(2)
    x, y = [part[:-3] for part in x], [part[:-3] for part in y]
    scores = whole.evaluate(x, y, batch_size=10, return_dict=True, verbose=0)
    predictions = whole.predict(x, batch_size=10, verbose=0)

    def program(comm):
        model = hvd.pipeline(cases.branched, cases.branched_plan(hvd, 2), 4)
        model.compile("sgd", cases.BRANCHED_LOSS, metrics=[["accuracy"], ["mae"]])
        mine = (x, None) if comm.rank == 0 else (None, y)
        found = model.evaluate(*mine, batch_size=10, return_dict=True, verbose=0)
        return (
            found,
            model.predict(x, batch_size=10, verbose=0),
            keras.tree.map_structure(np.asarray, model(x)),
        )

    for found, predicted, called in run_ranks(2, program):
        assert found == pytest.approx(scores, rel=1e-5)
        for outputs in (predicted, called):
            for mine, expected in zip(outputs, predictions, strict=True):
                np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_file_of_the_whole_model(tmp_path):
    """Weights and optimizer state, written by two ranks, read by plain Keras and by one rank."""
    x, y = cases.plain_data(4)
    options = {"batch_size": cases.ROWS, "shuffle": False, "verbose": 0}
    path = tmp_path / "whole.keras"

    def program(comm):
        model = make()
        model.compile(cases.OPTIMIZERS["adam"](), "mse", metrics=["mae"])
        checkpoint = keras.callbacks.ModelCheckpoint(str(path))
        model.fit(x[:32], y[:32], callbacks=[checkpoint], **options)
        model.save_weights(tmp_path / "only.weights.h5")
        left = _held(model)
        model.fit(x[32:], y[32:], **options)
        return cases.values(model), left == list(cases.values(model))

    results = run_ranks(2, program)
    assert all(forgotten for _, forgotten in results)
    expected = merged([weights for weights, _ in results])
    opened = keras.models.load_model(path)
    only = cases.plain()
    only.load_weights(tmp_path / "only.weights.h5")
    assert_close(cases.values(only), cases.values(opened), 0)
    assert int(opened.optimizer.iterations) == 2
    opened.fit(x[32:], y[32:], **options)
    assert_close(cases.values(opened), expected, 1e-6)

    def resumed(comm):
        model = make()
        model.compile(cases.OPTIMIZERS["adam"](), "mse")
        model.load_checkpoint(path)
        model.fit(x[32:], y[32:], **options)
        return cases.values(model)

    for ranks in (1, 2):
        assert_close(merged(run_ranks(ranks, resumed)), expected, 1e-6)

    def with_other_slots(comm):
        model = make()
        model.compile(keras.optimizers.Adam(amsgrad=True), "mse")
        model.load_checkpoint(path)

    with pytest.raises(ValueError, match="whose model was saved with the state"):
        run_ranks(1, with_other_slots)


@pytest.mark.slow
def test_masks_of_outputs_reach_the_loss(tmp_path):
    def masked():
        tokens = keras.Input((3,), dtype="int32")
        x = layers.Embedding(5, 4, mask_zero=True, name="words")(tokens)
        x = layers.Dense(4, name="hidden")(x)
        return keras.Model(tokens, layers.Dense(1, name="out")(x), name="masked")

    x = np.array([[1, 2, 0], [3, 0, 0], [4, 4, 0], [1, 0, 0]])
    y = np.ones((4, 3, 1))
    whole = masked()
    path = tmp_path / "masked.weights.h5"
    whole.save_weights(path)
    whole.compile("sgd", "mse")
    expected = whole.evaluate(x, y, verbose=0)

    def program(comm):
        model = make(masked)
        model.load_weights(path)
        model.compile("sgd", "mse")
        return model.evaluate(x, y, verbose=0)

    assert run_ranks(2, program) == pytest.approx([expected] * 2)


# -- refusals
# --------------------------------------------------------------------------------------------------


def refused(action, ranks=2):
    with pytest.raises(ValueError) as error:
        run_ranks(ranks, action)
    return str(error.value)


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


def compiling():
    model = cases.plain()
    model.compile("sgd", "mse")
    return model


def test_models_and_plans_that_cannot_be():
    plan = hvd.plan(cases.plain, places=2)
    three = hvd.plan(cases.plain, places=3)
    other = hvd.plan(cases.branched, places=2)
    assert "`microbatches` must be an integer" in refused(lambda comm: hvd.pipeline(cases.plain, plan, 0))
    assert "as many places as the pipeline has ranks" in refused(
        lambda comm: hvd.pipeline(cases.plain, three, 2)
    )
    assert "`plan` must be a plan for the model 'plain'" in refused(
        lambda comm: hvd.pipeline(cases.plain, other, 2)
    )
    assert "`plan` must be a hvd.Plan" in refused(lambda comm: hvd.pipeline(cases.plain, 2, 2))
    assert "`model` must be a Keras model, or a function" in refused(lambda comm: hvd.pipeline(3, plan, 2))
    assert "`recompute` must be True or False" in refused(
        lambda comm: hvd.pipeline(cases.plain, plan, 2, recompute=1)
    )
    assert "Sequential or functional" in refused(lambda comm: hvd.pipeline(Subclassed(), plan, 2))
    assert "compile what hvd.pipeline returns" in refused(lambda comm: hvd.pipeline(compiling, plan, 2))
    text = refused(lambda comm: hvd.pipeline(cases.plain, plan, 2 + comm.rank))
    assert "The ranks disagree about hvd.pipeline:\n  microbatches: rank 0: 2; rank 1: 3" in text
    with pytest.raises(TypeError, match="Did you mean `microbatches`"):
        hvd.pipeline(cases.plain, plan, microbatch=2)


def test_tensors_that_would_go_back():
    def tied():
        x = keras.Input((4,), name="x")
        shared = layers.Dense(4, name="shared")
        return keras.Model(x, shared(layers.Dense(4, name="between")(shared(x))), name="tied")

    plan = hvd.plan(tied, places=2, forward_only=False)
    assert "`plan` must let tensors go to later places only" in refused(
        lambda comm: hvd.pipeline(tied, plan, 2)
    )


class Named(layers.Layer):
    def call(self, x):
        return tf.strings.as_string(x)


def _text():
    """Strings that enter place 0; numbers, their names and the names' lengths."""
    text = keras.Input((), dtype="string", name="text")
    numbers = layers.Hashing(5, name="hash")(text)
    names = Named(name="names")(numbers)
    lengths = layers.Lambda(lambda s: tf.cast(tf.strings.length(s), "float32")[:, None], (1,), name="len")(
        names
    )
    return keras.Model(text, layers.Dense(1, name="out")(lengths), name="text")


def test_tensors_that_cannot_travel():
    def ragged():
        x = keras.Input((None,), ragged=True, name="rows")
        return keras.Model(x, layers.Dense(1)(layers.Lambda(tf.reduce_sum, (1,))(x)))

    def fixed():
        stack = [layers.Dense(n, name=f"dense_{n}") for n in (1, 2)]
        return keras.Sequential([keras.Input(batch_shape=(8, 6), name="eight"), *stack], name="fixed")

    def split(builder, **pins):
        plan = hvd.plan(builder, places=2, pins=pins)
        return lambda comm: hvd.pipeline(builder, plan, 2).predict(tf.constant(["a", "b"]), verbose=0).shape

    assert "must not give ragged tensors" in refused(split(ragged))
    text = refused(split(_text, names=0, len=1))
    assert "must not give string tensors from one place to another, or return them. Received: 'names'" in text
    assert run_ranks(2, split(_text, names=0, len=0, out=1)) == [(2, 1)] * 2
    text = refused(split(fixed))
    assert "`model` must take batches of any number of rows" in text
    assert text.endswith("of shape (8, 6).")


def test_a_layer_that_gives_another_dtype_than_it_says():
    def lying():
        cast = layers.Lambda(lambda x: tf.cast(x, "int32"), (6,), name="cast")
        return keras.Sequential([keras.Input((6,)), cast, layers.Dense(1, name="out")])

    def program(comm):
        hvd.pipeline(lying, hvd.plan(lying, places=2, pins={"cast": 0}), 2).predict(
            np.ones((2, 6)), verbose=0
        )

    with pytest.raises(TypeError, match="'cast', float32 in the model's graph and int32 when it runs"):
        run_ranks(2, program)


@pytest.mark.slow
def test_settings_of_training_that_cannot_be():
    x, y = cases.plain_data(1)

    def fit(comm, x=x, y=y, **options):
        model = make(microbatches=4)
        model.compile("sgd", "mse")
        model.fit(x, y, verbose=0, **options)

    text = refused(lambda comm: fit(comm, batch_size=6))
    assert "`microbatches` must divide the number of rows of each batch" in text
    assert "Received: microbatches=4 and 16 rows in batches of 6, of which some have 6." in text
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must divide the number of rows of each batch"):
        run_ranks(2, lambda comm: fit(comm, data, None))
    assert "`x` must have the same batches in the same order" in refused(
        lambda comm: fit(comm, x + comm.rank)
    )
    for options, rule in [
        ({"loss": None}, "`loss` must be given"),
        ({"loss": "mse", "jit_compile": True}, "`jit_compile` must be False"),
    ]:
        with pytest.raises(ValueError, match=rule):
            run_ranks(1, lambda comm, o=options: make().compile("sgd", **o))


def test_data_where_it_is_needed():
    x, y = np.ones((6, 3)), np.ones((6, 1))
    assert complete(x, None, needs_x=True, needs_y=False, rank=0) == (x, None) or True
    stand_in, targets = complete(None, y, needs_x=False, needs_y=True, rank=1)
    assert stand_in.shape == (6, 0)
    assert targets is y
    for given, place in [((None, y), (True, False)), ((None, None), (False, False))]:
        with pytest.raises(ValueError, match="`x` must be given on the rank of the first stage"):
            complete(*given, needs_x=place[0], needs_y=place[1], rank=0)
    with pytest.raises(ValueError, match="`y` must be given on the rank of the last stage"):
        complete(x, None, needs_x=False, needs_y=True, rank=1)
    assert microbatch_problem(4, 40, 8) is None
    assert "some have 2." in microbatch_problem(4, 10, 8)
