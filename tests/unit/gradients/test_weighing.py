"""Means over unlike counts: ranks as threads against plain Keras with the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import hvdext as hvd
from hvdext.testing import run_ranks

DATA = np.random.default_rng(3)
TOKENS = DATA.integers(1, 6, (16, 4))
TOKENS[::2, 1:] = 0  # half of the rows, those of rank 0, are nearly empty
X = DATA.random((16, 3)).astype("float32")
Y = DATA.random((16, 1)).astype("float32")
WEIGHTS = DATA.random(16).astype("float32")
OF_TOKENS = DATA.random((16, 4)).astype("float32")
HALVES = [slice(0, None, 2), slice(1, None, 2)]
UNLIKE = [slice(0, 5), slice(5, None)]  # 5 rows of 8 on one rank, 3 on the other


def words():
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Embedding(6, 3, mask_zero=True, embeddings_regularizer="l2")(tokens)
    return keras.Model(tokens, layers.Dense(6, activation="softmax", name="next")(x))


def words_and_number():
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Embedding(6, 3, mask_zero=True)(tokens)
    number = layers.Dense(1, name="number")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(tokens, [layers.Dense(6, activation="softmax", name="next")(x), number])


def numbers():
    """With penalties of weights, which count once, and of outputs, a mean over samples."""
    x = keras.Input((3,))
    hidden = layers.Dense(4, "relu", activity_regularizer="l2", kernel_regularizer="l2")(x)
    return keras.Model(x, layers.Dense(1)(hidden))


def plain():
    return keras.Sequential([keras.Input((3,)), layers.Dense(1)])


def mean_of_unreduced(y, y_pred):
    return keras.ops.expand_dims(mse(None)(y, y_pred), 1)


def own_mean(y, y_pred):
    return tf.reduce_sum(y * (y - y_pred) ** 2) / tf.reduce_sum(y)


CROSSENTROPY = "sparse_categorical_crossentropy"


def mse(reduction):
    return keras.losses.MeanSquaredError(reduction=reduction)


def fit(case, optimizer, cut, rows=8, callbacks=(), eagerly=True):
    """Weights and logs after two epochs of 16 samples in batches of `rows`, of which this rank has `cut`."""
    make, loss, data = case
    model = make()
    weights = np.random.default_rng(0)
    model.set_weights([weights.normal(scale=0.5, size=w.shape) for w in model.get_weights()])
    model.compile(optimizer, loss, run_eagerly=eagerly)
    model.fit(_Batches(data, rows, cut), epochs=2, verbose=0, shuffle=False, callbacks=list(callbacks))
    return model.get_weights(), model.history.history


class _Batches(keras.utils.PyDataset):
    def __init__(self, data, rows, cut):
        super().__init__()
        self._data, self._rows, self._cut = data, rows, cut

    def __len__(self):
        return 16 // self._rows

    def __getitem__(self, index):
        start = index * self._rows
        return keras.tree.map_structure(lambda t: t[start : start + self._rows][self._cut], self._data)


CASES = {
    "mask": ((words, CROSSENTROPY, (TOKENS, TOKENS)), HALVES, {}),
    "mask and sample weights": (
        (words, CROSSENTROPY, (TOKENS, TOKENS, OF_TOKENS)),
        HALVES,
        {},
    ),
    "one output of two is masked": (
        (words_and_number, [CROSSENTROPY, "mse"], (TOKENS, (TOKENS, Y))),
        HALVES,
        {},
    ),
    "mask, unlike batches": (
        (words_and_number, [CROSSENTROPY, "mse"], (TOKENS, (TOKENS, Y))),
        UNLIKE,
        {"weight_by": "samples"},
    ),
    "sum": ((numbers, mse("sum"), (X, Y)), HALVES, {}),
    "sum, unlike batches": ((numbers, mse("sum"), (X, Y)), UNLIKE, {"weight_by": "samples"}),
    "unreduced, with weights": ((plain, mse(None), (X, Y, WEIGHTS)), HALVES, {}),
    "one output of two is unreduced": (
        (words_and_number, [CROSSENTROPY, mse(None)], (TOKENS, (TOKENS, Y))),
        HALVES,
        {},
    ),
    "unreduced, unlike batches": ((plain, mse(None), (X, Y)), UNLIKE, {"weight_by": "samples"}),
    "a mean of unreduced ones": ((plain, mean_of_unreduced, (X, Y)), HALVES, {}),
    "mean with weights": ((numbers, mse("mean_with_sample_weight"), (X, Y, WEIGHTS)), HALVES, {}),
    "unlike batches": ((numbers, "mse", (X, Y, WEIGHTS)), UNLIKE, {"weight_by": "samples"}),
    "a mean of one's own": (
        (numbers, own_mean, (X, Y)),
        UNLIKE,
        {"weight_by": lambda x, y, sample_weight: tf.reduce_sum(y)},
    ),
}
IN_GRAPH = ["mask", "unlike batches"]


def assert_one_process(case, ranks, make=lambda: keras.optimizers.SGD(0.02, momentum=0.9), rows=8):
    weights, logs = fit(case, make(), slice(None), rows)
    for got, shown in ranks:
        for mine, right in zip(got, weights, strict=True):
            np.testing.assert_allclose(mine, right, atol=2e-6)
        for name in logs:
            np.testing.assert_allclose(shown[name], logs[name], rtol=1e-5, err_msg=name)


SAMPLE = ["mask", "one output of two is masked", "unlike batches"]
MARKED = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", MARKED)
def test_one_process_with_the_whole_batch(name):
    case, cuts, options = CASES[name]

    def one_rank(comm):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.02, momentum=0.9), **options)
        average = [hvd.callbacks.MetricAverageCallback()]
        return fit(case, optimizer, cuts[comm.rank], callbacks=average, eagerly=name not in IN_GRAPH)

    assert_one_process(case, run_ranks(2, one_rank))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask", "unlike batches"])
@pytest.mark.parametrize("average", [True, False])
def test_a_cycle_of_micro_batches_is_one_batch(name, average):
    case, cuts, options = CASES[name]
    if name == "unlike batches":  # without what its layers add
        case = (plain, *case[1:])

    def one_rank(comm):
        rate = 0.1 if average else 0.05
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.SGD(rate),
            backward_passes_per_step=2,
            average_aggregated_gradients=average,
            **options,
        )
        return fit(case, optimizer, cuts[comm.rank])[0], {}

    weights, _ = fit(case, keras.optimizers.SGD(0.1), slice(None), rows=16)
    for got, _ in run_ranks(2, one_rank):
        for mine, right in zip(got, weights, strict=True):
            np.testing.assert_allclose(mine, right, atol=1e-6)


def test_keras_accumulation_is_that_of_one_process():
    case, cuts, _ = CASES["mask"]

    def make():
        return keras.optimizers.SGD(0.1, gradient_accumulation_steps=2, global_clipnorm=0.1)

    ranks = run_ranks(2, lambda comm: (fit(case, hvd.DistributedOptimizer(make()), cuts[comm.rank])[0], {}))
    weights, _ = fit(case, make(), slice(None))
    for got, _ in ranks:
        for mine, right in zip(got, weights, strict=True):
            np.testing.assert_allclose(mine, right, atol=1e-6)


def test_where_nobody_asked_batches_of_other_sizes_are_told(capfd):
    case, cuts, _ = CASES["unlike batches"]
    run_ranks(2, lambda comm: fit(case, hvd.DistributedOptimizer("sgd"), cuts[comm.rank]))
    told = [line for line in capfd.readouterr().err.splitlines() if "weight_by='samples'" in line]
    assert len(told) == 1, told
    assert "[5 3] samples on ranks" in told[0]


def test_equal_batches_are_not_told(capfd):
    case, _, _ = CASES["unlike batches"]
    run_ranks(2, lambda comm: fit(case, hvd.DistributedOptimizer("sgd"), HALVES[comm.rank]))
    assert "weight_by" not in capfd.readouterr().err


def test_where_nobody_asked_a_loss_of_one_number_is_told():
    case, _, _ = CASES["a mean of one's own"]
    with pytest.warns(UserWarning, match="weight_by=lambda"):
        run_ranks(2, lambda comm: fit(case, hvd.DistributedOptimizer("sgd"), HALVES[comm.rank]))


def test_in_a_loop_of_one_s_own_a_mask_is_told_and_loss_weight_is_exact():
    def one_rank(comm):
        model = words()
        model.set_weights([np.full_like(w, 0.1) for w in model.get_weights()])
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
        mine = TOKENS[comm.rank :: 2]
        with tf.GradientTape() as tape:
            loss = keras.losses.SparseCategoricalCrossentropy()(mine, model(mine))
            loss *= hvd.loss_weight(np.count_nonzero(mine))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return model.get_weights()

    model = words()
    model.set_weights([np.full_like(w, 0.1) for w in model.get_weights()])
    with tf.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy()(TOKENS, model(TOKENS))
    keras.optimizers.SGD(1.0).apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    with pytest.warns(UserWarning, match=r"hvd\.loss_weight"):
        ranks = run_ranks(2, one_rank)
    for got in ranks:
        for mine, right in zip(got, model.get_weights(), strict=True):
            np.testing.assert_allclose(mine, right, atol=1e-6)


WRONG = [
    ({"weight_by": "tokens"}, '`weight_by` must be None, "samples" or a function'),
    ({"weight_by": "samples", "op": hvd.Adasum}, "Adasum is no mean"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        hvd.DistributedOptimizer("sgd", **options)


def test_refused_outside_of_fit():
    def one_rank(comm):
        variable = keras.Variable(1.0)
        optimizer = hvd.DistributedOptimizer("sgd", weight_by="samples")
        optimizer.apply([tf.constant(1.0)], [variable])

    with pytest.raises(RuntimeError, match=r"hvd\.loss_weight"):
        run_ranks(2, one_rank)


def test_a_count_with_axes_is_refused():
    case, _, _ = CASES["unlike batches"]

    def one_rank(comm):
        optimizer = hvd.DistributedOptimizer("sgd", weight_by=lambda x, y, sample_weight: sample_weight)
        fit(case, optimizer, HALVES[comm.rank])

    with pytest.raises(ValueError, match="must give one number for a batch"):
        run_ranks(2, one_rank)
