"""`hvd.allreduce` and the other collectives for users: values and gradients worked out by NumPy.

Values and gradients are tables of calls, made in a `tf.function` and some of them eagerly, too; their results
are compared with what `expected(size)[rank]` says. Threads as ranks run the same programs.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program, adasum_of


def rows(rank, count=4, dtype="float64"):
    """`count` rows of three numbers, different on every rank."""
    numbers = np.random.default_rng([7, rank]).integers(-9, 10, size=(count, 3))
    return (numbers / 4).astype(dtype) if dtype.startswith("float") else numbers.astype(dtype)


def everyone(size, count=4, dtype="float64"):
    return np.stack([rows(rank, count, dtype) for rank in range(size)])


def blocks(array, size):
    """Rows dealt out as by Horovod's reducescatter: the first ranks get one more."""
    return np.array_split(array, size)


def same(function):
    return lambda size: [function(size)] * size


def average_of_integers(size):
    total = everyone(size, dtype="int32").sum(0)
    return np.trunc(total / size)


def gathered(slices):
    return [slices.values, slices.indices]


def floating_mean(array, size):
    kind = "float32" if array.dtype.itemsize == 1 else "float64"
    return (array.astype(kind) / np.asarray(size, kind)).astype("float64")


# -- values: name, what each rank calls, what must come back ---------------------------------------------

VALUES = {
    "average": (lambda hvd, r: hvd.allreduce(rows(r)), same(lambda n: everyone(n).mean(0))),
    "sum, named": (
        lambda hvd, r: hvd.allreduce(rows(r), "a name/with:signs", op=hvd.Sum),
        same(lambda n: everyone(n).sum(0)),
    ),
    "factors": (
        lambda hvd, r: hvd.allreduce(rows(r), prescale_factor=0.1, postscale_factor=3.0),
        same(lambda n: everyone(n).mean(0) * 0.3),
    ),
    "min": (lambda hvd, r: hvd.allreduce(rows(r), op=hvd.Min), same(lambda n: everyone(n).min(0))),
    "max": (lambda hvd, r: hvd.allreduce(rows(r), op=hvd.Max), same(lambda n: everyone(n).max(0))),
    "product": (
        lambda hvd, r: hvd.allreduce(rows(r), op=hvd.Product),
        same(lambda n: everyone(n).prod(0)),
    ),
    "average of integers": (
        lambda hvd, r: hvd.allreduce(rows(r, dtype="int32")),
        same(average_of_integers),
    ),
    "integers with factors": (
        lambda hvd, r: hvd.allreduce(rows(r, dtype="int64"), op=hvd.Sum, prescale_factor=0.5),
        same(lambda n: np.trunc(everyone(n, dtype="int64") * 0.5).sum(0)),
    ),
    "bool": (lambda hvd, r: hvd.allreduce(np.array([r == 1, False]), op=hvd.Max), same(lambda n: [1, 0])),
    "python number": (lambda hvd, r: hvd.allreduce(float(r)), same(lambda n: (n - 1) / 2)),
    "keras variable": (
        lambda hvd, r: hvd.allreduce(KERAS_VARIABLE[r], op=hvd.Sum),
        same(lambda n: n * (n - 1) / 2 * np.ones(2)),
    ),
    "fp16": (
        lambda hvd, r: hvd.allreduce(rows(r, dtype="float32"), op=hvd.Sum, compression=hvd.Compression.fp16),
        same(lambda n: everyone(n).sum(0)),  # quarters below 32 are exact in float16
    ),
    "fp16, max": (
        lambda hvd, r: hvd.allreduce(
            rows(r, dtype="float32") + np.float32(1 / 4096), op=hvd.Max, compression=hvd.Compression.fp16
        ),
        same(lambda n: (everyone(n, dtype="float32") + np.float32(1 / 4096)).astype("float16").max(0)),
    ),
    "slices": (
        lambda hvd, r: tf.convert_to_tensor(
            hvd.allreduce(tf.IndexedSlices(tf.constant(rows(r, r + 1)), tf.range(r + 1), tf.constant([5, 3])))
        ),
        same(lambda n: sum(np.pad(rows(r, r + 1), [[0, 4 - r], [0, 0]]) for r in range(n)) / n),
    ),
    "slices of integers": (
        lambda hvd, r: [
            tf.cast(part, tf.float64)
            for dtype in ("uint8", "int8", "int32", "int64")
            for op in (hvd.Sum, hvd.Average)
            for part in gathered(
                hvd.allreduce(
                    tf.IndexedSlices(
                        tf.constant(rows(r, 1, dtype=dtype)), tf.constant([r]), tf.constant([5, 3])
                    ),
                    op=op,
                    name=f"integers.{dtype}.{op.value}",
                )
            )
        ],
        same(
            lambda n: [
                part
                for dtype in ("uint8", "int8", "int32", "int64")
                for divisor in (1, n)
                for part in (
                    floating_mean(np.concatenate([rows(r, 1, dtype=dtype) for r in range(n)]), divisor),
                    np.arange(n, dtype="float64"),
                )
            ]
        ),
    ),
    "group of kinds": (
        lambda hvd, r: [
            tf.cast(tf.convert_to_tensor(t), tf.float64)
            for t in hvd.grouped_allreduce(
                [
                    rows(r),
                    rows(r, dtype="int32"),
                    tf.IndexedSlices(tf.constant(rows(r)), tf.constant([1, 1, 0, 3]), tf.constant([4, 3])),
                    2 * rows(r),
                ],
                op=hvd.Sum,
                name="kinds",
            )
        ],
        same(
            lambda n: [
                everyone(n).sum(0),
                everyone(n, dtype="int32").sum(0),
                np.array([[0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]) @ everyone(n).sum(0),
                2 * everyone(n).sum(0),
            ]
        ),
    ),
    "empty group": (lambda hvd, r: hvd.grouped_allreduce([]), same(lambda n: [])),
    "gather": (
        lambda hvd, r: hvd.allgather(rows(r, r + 1)),
        same(lambda n: np.concatenate([rows(r, r + 1) for r in range(n)])),
    ),
    "gather nothing from rank 0": (
        lambda hvd, r: hvd.allgather(rows(r, r)),
        same(lambda n: np.concatenate([rows(r, r) for r in range(n)])),
    ),
    "gather a group": (
        lambda hvd, r: hvd.grouped_allgather([rows(r, r + 1), rows(r, dtype="int32")], name="group"),
        same(
            lambda n: [
                np.concatenate([rows(r, r + 1) for r in range(n)]),
                np.concatenate(list(everyone(n, dtype="int32"))),
            ]
        ),
    ),
    "broadcast": (lambda hvd, r: hvd.broadcast(rows(r), 1), same(lambda n: rows(1))),
    "reducescatter": (
        lambda hvd, r: hvd.reducescatter(rows(r, 5)),
        lambda n: blocks(everyone(n, 5).mean(0), n),
    ),
    "reducescatter, sum, factors": (
        lambda hvd, r: hvd.reducescatter(rows(r, 7), "rs", hvd.Sum, prescale_factor=0.1, postscale_factor=5),
        lambda n: blocks(everyone(n, 7).sum(0) * 0.5, n),
    ),
    "reducescatter of integers": (
        lambda hvd, r: hvd.reducescatter(rows(r, dtype="int32")),
        lambda n: blocks(average_of_integers(n), n),
    ),
    "reducescatter, fewer rows than ranks": (
        lambda hvd, r: hvd.reducescatter(rows(r, 1), op=hvd.Sum),
        lambda n: blocks(everyone(n, 1).sum(0), n),
    ),
    "reducescatter, fp16": (
        lambda hvd, r: hvd.reducescatter(
            rows(r, dtype="float32"), op=hvd.Sum, compression=hvd.Compression.fp16
        ),
        lambda n: blocks(everyone(n).sum(0), n),
    ),
    "reducescatter a group": (
        lambda hvd, r: hvd.grouped_reducescatter([rows(r, 5), rows(r, 4, "float32")], op=hvd.Sum),
        lambda n: [
            list(pair)
            for pair in zip(blocks(everyone(n, 5).sum(0), n), blocks(everyone(n).sum(0), n), strict=True)
        ],
    ),
    "alltoall": (
        lambda hvd, r: hvd.alltoall(rows(r, 2 * hvd.size())),
        lambda n: [np.concatenate([rows(s, 2 * n)[2 * r : 2 * r + 2] for s in range(n)]) for r in range(n)],
    ),
    "alltoall with splits": (
        # Rank s sends s rows to rank 0 and one to each of the others.
        lambda hvd, r: list(hvd.alltoall(rows(r, r + hvd.size() - 1), [r] + [1] * (hvd.size() - 1))),
        lambda n: [
            [np.concatenate([rows(s, s + n - 1)[:s] for s in range(n)]), np.arange(n)],
            *([np.stack([rows(s, s + n - 1)[s + r - 1] for s in range(n)]), np.ones(n)] for r in range(1, n)),
        ],
    ),
}
KERAS_VARIABLE: dict = {}
EAGER = (
    "average",
    "sum, named",
    "min",
    "average of integers",
    "fp16",
    "slices",
    "group of kinds",
    "gather",
    "gather a group",
    "broadcast",
    "reducescatter",
    "reducescatter a group",
    "alltoall",
    "alltoall with splits",
)


def _run_values(hvd):
    rank = hvd.rank()
    KERAS_VARIABLE[rank] = keras.Variable(rank * np.ones(2), dtype="float64")
    calls = {name: call for name, (call, _) in VALUES.items()}
    eager = {name: calls[name](hvd, rank) for name in EAGER}
    graph = tf.function(lambda: {name: call(hvd, rank) for name, call in calls.items()})()
    return tf.nest.map_structure(lambda t: t.numpy(), {"eager": eager, "graph": graph})


def _check_values(ranks):
    for name, (_, expected) in VALUES.items():
        for way in ("eager", "graph") if name in EAGER else ("graph",):
            for rank, wanted in enumerate(expected(len(ranks))):
                found = ranks[rank][way][name]
                if not isinstance(wanted, list):
                    found, wanted = [found], [wanted]
                assert len(found) == len(wanted)
                for f, w in zip(found, wanted, strict=True):
                    np.testing.assert_allclose(
                        np.reshape(f, np.shape(w)), w, rtol=0, atol=1e-12, err_msg=f"{name}, {way}, {rank}"
                    )


# -- gradients: of the sum of weights * result on each rank -----------------------------------------------


def weights(rank, count=4):
    return np.random.default_rng([8, rank]).normal(size=(count, 3))


def mean_weights(n, count):
    return np.mean([weights(s, count) for s in range(n)], axis=0)


def gathered_weights(n, total):
    return np.concatenate([weights(s, len(block)) for s, block in enumerate(blocks(np.zeros(total), n))])


def own_rows(n):
    """What allgather gives back to ranks that sent rank + 1 rows."""
    ends = np.cumsum(np.arange(n) + 1)
    return [mean_weights(n, ends[-1])[e - r - 1 : e] for r, e in enumerate(ends)]


GRADIENTS = {
    "sum": (
        lambda hvd, r, x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0),
        same(lambda n: 1.5 * n * mean_weights(n, 4)),
    ),
    "average": (lambda hvd, r, x: hvd.allreduce(x), same(lambda n: mean_weights(n, 4))),
    "group": (
        lambda hvd, r, x: hvd.grouped_allreduce([x, 2 * x], op=hvd.Sum)[1],
        same(lambda n: 2 * n * mean_weights(n, 4)),
    ),
    "gather": (lambda hvd, r, x: hvd.allgather(x), own_rows),
    "broadcast": (
        lambda hvd, r, x: hvd.broadcast(x, 1),
        lambda n: [mean_weights(n, 4) * (r == 1) for r in range(n)],
    ),
    "reducescatter": (
        lambda hvd, r, x: hvd.reducescatter(x, prescale_factor=0.5),
        same(lambda n: 0.5 * gathered_weights(n, 5)),
    ),
    "reducescatter, sum": (
        lambda hvd, r, x: hvd.grouped_reducescatter([x], op=hvd.Sum, postscale_factor=0.5)[0],
        same(lambda n: 0.5 * n * gathered_weights(n, 5)),
    ),
    "alltoall": (
        lambda hvd, r, x: hvd.alltoall(x, [r] + [1] * (hvd.size() - 1))[0],
        lambda n: [
            np.concatenate(
                [
                    weights(0, n * (n - 1) // 2)[r * (r - 1) // 2 : r * (r + 1) // 2],
                    *(weights(d, n)[r : r + 1] for d in range(1, n)),
                ]
            )
            for r in range(n)
        ],
    ),
}
ROWS_GIVEN = {
    "gather": lambda r, n: r + 1,
    "reducescatter": lambda r, n: 5,
    "reducescatter, sum": lambda r, n: 5,
    "alltoall": lambda r, n: r + n - 1,
}


def _gradient(hvd, name):
    x = tf.constant(rows(hvd.rank(), ROWS_GIVEN.get(name, lambda r, n: 4)(hvd.rank(), hvd.size())))
    with tf.GradientTape() as tape:
        tape.watch(x)
        result = GRADIENTS[name][0](hvd, hvd.rank(), x)
        loss = tf.reduce_sum(result * tf.constant(weights(hvd.rank(), 40))[: tf.shape(result)[0]])
    return tape.gradient(loss, x)


def _second_derivative(hvd):
    x = tf.constant(rows(hvd.rank()))
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(hvd.allreduce(x, op=hvd.Sum) ** 2)
        first = inner.gradient(loss, x)
        weighted = tf.reduce_sum(first * weights(hvd.rank()))
    return outer.gradient(weighted, x)


def _run_gradients(hvd):
    def all_of_them():
        return {name: _gradient(hvd, name) for name in GRADIENTS} | {"second": _second_derivative(hvd)}

    found = {
        "eager": {name: _gradient(hvd, name) for name in ("sum", "gather", "broadcast", "alltoall")},
        "graph": tf.function(all_of_them)(),
    }
    return tf.nest.map_structure(lambda t: t.numpy(), found)


def _check_gradients(ranks):
    n = len(ranks)
    wanted = {name: expected(n) for name, (_, expected) in GRADIENTS.items()}
    # The first derivative is 2 n sum(x); that of its product with w is 2 n sum(w).
    wanted["second"] = [2 * n * n * mean_weights(n, 4)] * n
    for way, names in (("eager", ranks[0]["eager"]), ("graph", wanted)):
        for name in names:
            expected = wanted[name]
            for rank in range(n):
                np.testing.assert_allclose(
                    np.reshape(ranks[rank][way][name], expected[rank].shape),
                    expected[rank],
                    rtol=0,
                    atol=1e-12,
                    err_msg=f"{name}, {way}, {rank}",
                )


# -- Adasum, minimum and others that have no gradient -----------------------------------------------------


def _run_adasum(hvd):
    eager = hvd.allreduce(rows(hvd.rank()), op=hvd.Adasum)
    graph = tf.function(lambda: hvd.grouped_allreduce([rows(hvd.rank())] * 2, op=hvd.Adasum))()
    return [eager.numpy(), *(t.numpy() for t in graph)]


def _check_adasum(ranks):
    wanted = adasum_of(list(everyone(len(ranks))))
    for rank in ranks:
        for found in rank:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13)


# -- names: a retraced function, loops, the same name twice -----------------------------------------------


def _run_names(hvd):
    rank = hvd.rank()

    @tf.function(reduce_retracing=False)
    def twice(x):
        return hvd.allreduce(x, op=hvd.Sum) + 10 * hvd.allreduce(2 * x, op=hvd.Sum)

    @tf.function
    def around(x):
        return twice(x) + twice(3 * x) + hvd.allreduce(x, "again") + hvd.allreduce(x, "again", op=hvd.Max)

    @tf.function
    def loop(x):
        total = tf.zeros_like(x)
        for i in tf.range(5):
            total += hvd.allreduce(x * tf.cast(i, x.dtype), op=hvd.Sum)
        return total

    # Rank 0 has traced more shapes than the others, when all call with the same.
    lengths = [3, 2] if rank == 0 else [2, 3]
    shapes = {n: twice.get_concrete_function(tf.TensorSpec([n], tf.float64)) for n in lengths}
    x = tf.constant([1.0 + rank, 5.0], tf.float64)
    return [f.numpy() for f in (twice(x), shapes[3](tf.ones(3, tf.float64)), around(x), loop(x))]


def _check_names(ranks):
    n = len(ranks)
    total = np.array([n * (n + 1) / 2, 5 * n])
    wanted = [21 * total, 21 * n * np.ones(3), 4 * 21 * total + total / n + np.array([n, 5]), 10 * total]
    for rank in ranks:
        for found, expected in zip(rank, wanted, strict=True):
            np.testing.assert_allclose(found, expected)


class CountingModel(keras.Model):
    """Its loss is the mean of the ranks' losses; its optimizer exchanges nothing."""

    def __init__(self, hvd):
        super().__init__()
        self.hvd = hvd
        self.weight = self.add_weight(shape=(), initializer="ones", name="weight")

    def call(self, x):
        return self.weight * x

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.hvd.allreduce(tf.reduce_mean((self(x) - y) ** 2))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss, "rows": tf.shape(self.hvd.allgather(x))[0]}


def _run_train_step(hvd):
    x = np.arange(4.0)[:, None] + hvd.rank()
    model = CountingModel(hvd)
    model.compile(keras.optimizers.SGD(0.01), jit_compile=False)
    history = model.fit(x, 3 * x, batch_size=2, epochs=2, shuffle=False, verbose=0)
    return {"weight": float(model.weight.numpy()), "rows": history.history["rows"]}


def _check_train_step(ranks):
    # The mean's gradient reaches each rank's own rows only: weights stay apart.
    for rank, found in enumerate(ranks):
        weight = 1.0
        for start in (0, 2, 0, 2):
            x = start + np.arange(2.0) + rank
            weight -= 0.01 * np.mean(2 * (weight - 3) * x * x)
        np.testing.assert_allclose(found["weight"], weight, rtol=1e-5)
        assert found["rows"] == [2 * len(ranks)] * 2


def _run_in_place(hvd):
    variables = [keras.Variable(rows(hvd.rank()), dtype="float64"), tf.Variable([hvd.rank()])]
    eager = hvd.broadcast_(variables, 1)
    found = [*eager, *(tf.convert_to_tensor(v) for v in variables)]
    variables[1].assign([10 * hvd.rank()])
    tf.function(lambda: hvd.broadcast_(variables[1:], 0, name="start"))()
    return [t.numpy() for t in found] + [variables[1].numpy()]


def _check_in_place(ranks):
    for rank in ranks:
        for found, expected in zip(rank, [rows(1), [1], rows(1), [1], [0]], strict=True):
            np.testing.assert_array_equal(found, expected)


# -- refusals: the same kind of error on every rank, and everything works afterwards ---------------------


def _refused(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)[:600]]
    return ["no error", ""]


def _run_refusals(hvd):
    r = hvd.rank()
    odd = r == 1
    actions = {
        "shape": lambda: hvd.allreduce(np.zeros(3 if odd else 2), "shape"),
        "dtype": lambda: hvd.allreduce(np.zeros(2, "float32" if odd else "float64")),
        "op": lambda: hvd.allreduce(np.zeros(2), op=hvd.Min if odd else hvd.Max),
        "slices": lambda: hvd.allreduce(
            tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), tf.constant([3, 2]))
            if odd
            else tf.ones([3, 2])
        ),
        "columns": lambda: hvd.allgather(np.zeros([2, 3 if odd else 2])),
        "scalar": lambda: hvd.allgather(1.0 if odd else [1.0]),
        "scalars": lambda: hvd.allgather(1.0),
        "text": lambda: hvd.allreduce("text" if odd else 1.0),
        "rows": lambda: hvd.reducescatter(np.zeros([3 if odd else 2, 2])),
        "scalar to scatter": lambda: hvd.reducescatter(1.0 if odd else [1.0]),
        "value of root": lambda: hvd.broadcast(np.zeros(3 if odd else 2), 0),
        "root": lambda: hvd.broadcast(np.zeros(3), 1 if odd else 0),
        "splits": lambda: hvd.alltoall(
            np.zeros([4]), [9] * hvd.size() if odd else [4] + [0] * (hvd.size() - 1)
        ),
        "number of splits": lambda: hvd.alltoall(np.zeros([4]), [4] if odd else [4] + [0] * (hvd.size() - 1)),
        "uneven": lambda: hvd.alltoall(np.zeros([2 * hvd.size() + odd])),
        "splits in a graph": tf.function(
            lambda: hvd.alltoall(np.zeros([4]), [9] * hvd.size() if odd else [4] + [0] * (hvd.size() - 1))
        ),
        "group": lambda: hvd.grouped_allreduce([np.zeros(2)] * (1 if odd else 2)),
        "order of a group": lambda: hvd.grouped_allreduce(
            [np.zeros(3 if odd else 2), np.zeros(2 if odd else 3)]
        ),
        "order of a group in a graph": tf.function(
            lambda: hvd.grouped_allreduce([np.zeros(3 if odd else 2), np.zeros(2 if odd else 3)])
        ),
        "turned group in a graph": tf.function(
            lambda: hvd.grouped_allreduce([np.zeros([3, 2] if odd else [2, 3]), np.zeros(1)])
        ),
        "group to gather": lambda: hvd.grouped_allgather([1.0] if odd else [[1.0], [2.0]]),
        "group to scatter": lambda: hvd.grouped_reducescatter([[1.0, 2.0]] if odd else [[1.0]]),
        "variables": lambda: hvd.broadcast_([tf.Variable(1.0)] * (1 if odd else 2), 0),
        "object": lambda: hvd.allgather_object(_Unpicklable() if odd else 1),
        "object of the root": lambda: hvd.broadcast_object(_Unpicklable(), 0),
    }
    found = {}
    for name, action in actions.items():
        found[name] = _refused(action)
        # In between, everything works.
        found[f"after {name}"] = hvd.allreduce(float(r), op=hvd.Sum).numpy()
        assert hvd.allgather([r]).shape[0] == hvd.size()
    return found


class _Unpicklable:
    def __reduce__(self):
        raise TypeError("cannot be sent")


_TYPES = {
    "splits in a graph": "InvalidArgumentError",
    "scalars": "ValueError",  # on all ranks: nobody waits
    "object": "ValueError",
    "object of the root": "ValueError",
}
# The engine says it itself; of threads, TensorFlow says that a Python function has failed.
_IN_GRAPHS = {"order of a group in a graph", "turned group in a graph"}
_WORDS = {
    "splits": "Received otherwise on the ranks [1]",
    "number of splits": "Received otherwise on the ranks [1]",
    "uneven": "must divide the rows",
    "splits in a graph": "must be",
    "group": "number of tensors: rank",
    "order of a group": "tensor 0: rank",
    "order of a group in a graph": "[2], [3]",
    "turned group in a graph": "[3, 2], [1]",
    "group to gather": "number of tensors: rank",
    "group to scatter": "tensor 0: rank",
    "variables": "number of variables: rank",
    "object": "`obj` must be an object that pickles. Received:\n  rank 1: _Unpicklable: cannot be sent",
    "object of the root": "`obj` must be an object that pickles. Received:\n  rank 0: _Unpicklable",
    "scalars": "at least one axis",
}


def _check_refusals(ranks):
    for rank, found in enumerate(ranks):
        for name, answer in found.items():
            if name.startswith("after "):
                assert answer == sum(range(len(ranks)))
                continue
            kind, text = answer
            if name in _IN_GRAPHS:
                words = {"FailedPreconditionError": _WORDS[name], "InvalidArgumentError": "ValueError"}
                assert words[kind] in text, (name, rank, answer)
                continue
            assert kind == _TYPES.get(name, "MismatchError"), (name, rank, answer)
            if name in _WORDS:
                assert _WORDS[name].replace(": rank", "") in text, (name, rank, answer)
            else:
                assert "must fit together on all ranks" in text, (name, rank, answer)


# -- objects -----------------------------------------------------------------------------------------------


def _run_objects(hvd):
    r = hvd.rank()
    double = hvd.broadcast_object((lambda x: 2 * x + 100 * r) if r == 1 else None, root_rank=1)
    return {
        "called": double(3),
        "gathered": hvd.allgather_object({"rank": r, "long": "x" * 1000 * r}, name="settings"),
        "lambdas": [f(1) for f in hvd.allgather_object(lambda x: x + r)],
        "ignored": hvd.broadcast_object("word" if r == 0 else _Unpicklable(), name="vocabulary/1"),
    }


def _check_objects(ranks):
    n = len(ranks)
    for found in ranks:
        assert found["called"] == 106
        assert found["gathered"] == [{"rank": r, "long": "x" * 1000 * r} for r in range(n)]
        assert found["lambdas"] == [1 + r for r in range(n)]
        assert found["ignored"] == "word"


# -- process sets ------------------------------------------------------------------------------------------


def _run_sets(hvd):
    r = hvd.rank()
    mine, other = ([0, 2], [1, 3]) if r % 2 == 0 else ([1, 3], [0, 2])
    part = {"process_set": hvd.ProcessSet(mine)}
    x = rows(r)
    summed, both = tf.function(lambda: [hvd.allreduce(x, op=hvd.Sum, **part), hvd.allreduce(x, op=hvd.Sum)])()
    variable = tf.Variable(x)
    hvd.broadcast_([variable], mine[1], **part)
    return {
        "sum": summed.numpy(),
        "all": both.numpy(),
        "global": hvd.allreduce(x, op=hvd.Sum, process_set=hvd.global_process_set).numpy(),
        "group": hvd.grouped_allreduce([x, x], process_set=part["process_set"])[1].numpy(),
        "min": hvd.allreduce(x, op=hvd.Min, **part).numpy(),
        "gather": hvd.allgather(x, **part).numpy(),
        "gather group": hvd.grouped_allgather([x], **part)[0].numpy(),
        "broadcast": hvd.broadcast(x, mine[1], **part).numpy(),
        "in place": variable.numpy(),
        "scatter": hvd.reducescatter(x, op=hvd.Sum, **part).numpy(),
        "scatter group": hvd.grouped_reducescatter([x], op=hvd.Sum, **part)[0].numpy(),
        "alltoall": hvd.alltoall(x, [1, 3], **part)[0].numpy(),
        "object": hvd.broadcast_object(r, mine[1], **part),
        "objects": hvd.allgather_object(r, **part),
        "not a member": _refused(lambda: hvd.allreduce(x, process_set=hvd.ProcessSet(other))),
        "root outside": _refused(lambda: hvd.broadcast(x, other[0], **part)),
    }


def _check_sets(ranks):
    for rank, found in enumerate(ranks):
        mine = [0, 2] if rank % 2 == 0 else [1, 3]
        place = mine.index(rank)
        parts = np.stack([rows(r) for r in mine])
        total = parts.sum(0)
        for name, expected in {
            "sum": total,
            "all": everyone(4).sum(0),
            "global": everyone(4).sum(0),
            "group": total / 2,
            "min": parts.min(0),
            "gather": np.concatenate(list(parts)),
            "gather group": np.concatenate(list(parts)),
            "broadcast": parts[1],
            "in place": parts[1],
            "scatter": total[2 * place : 2 * place + 2],
            "scatter group": total[2 * place : 2 * place + 2],
            "alltoall": np.concatenate([p[:1] if place == 0 else p[1:] for p in parts]),
        }.items():
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-14, err_msg=name)
        assert found["object"] == mine[1]
        assert found["objects"] == mine
        assert found["not a member"][0] == "ValueError"
        assert "must contain the rank" in found["not a member"][1]
        assert found["root outside"][0] == "ValueError"
        assert f"`root_rank` must be one of the ranks {mine}" in found["root outside"][1]


# -- batch normalization -----------------------------------------------------------------------------------


def batch(rank, step):
    """Rows around 1000, where the usual formula for the variance loses its digits."""
    generator = np.random.default_rng([9, rank, step])
    return 1000 + rank + generator.normal(size=(4, 3)), generator.normal(size=(4, 1))


def normalizing_model(layer, dtype):
    model = keras.Sequential(
        [
            keras.Input((3,), dtype=dtype),
            layer(name="first", momentum=0.5, dtype=dtype),
            keras.layers.Dense(4, activation="tanh", name="dense", dtype=dtype),
            layer(name="second", momentum=0.5, dtype=dtype),
            keras.layers.Dense(1, name="out", dtype=dtype),
        ]
    )
    generator = np.random.default_rng(5)
    model.set_weights([generator.uniform(0.1, 1, size=w.shape) for w in model.get_weights()])
    return model


def train(model, optimizer, batches):
    model.compile(optimizer, "mse", jit_compile=False)
    for x, y in batches:
        model.train_on_batch(x, y)
    return model.get_weights()


def _run_normalization(hvd):
    result = {}
    for dtype in ("float64", "float32"):
        model = normalizing_model(hvd.SyncBatchNormalization, dtype)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name=f"sgd_{dtype}"))
        result[dtype] = train(model, optimizer, [batch(hvd.rank(), step) for step in range(3)])
        before = hvd.traffic()["sync_bn"].calls
        model(batch(0, 0)[0], training=False)
        model.predict(batch(0, 0)[0], verbose=0)
        result[f"{dtype}, calls"] = before, hvd.traffic()["sync_bn"].calls
    return result


def _check_normalization(ranks):
    n = len(ranks)
    for dtype, tolerance in [("float64", 1e-7), ("float32", 2e-4)]:
        model = normalizing_model(keras.layers.BatchNormalization, "float64")
        whole = [
            tuple(np.concatenate(parts) for parts in zip(*(batch(r, step) for r in range(n)), strict=True))
            for step in range(3)
        ]
        expected = train(model, keras.optimizers.SGD(0.1), whole)
        start = normalizing_model(keras.layers.BatchNormalization, "float64").get_weights()
        assert all(np.max(np.abs(a - b)) > 1e-3 for a, b in zip(expected, start, strict=True))
        for rank in ranks:
            for found, wanted in zip(rank[dtype], expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
            before, after = rank[f"{dtype}, calls"]
            assert before == after > 0


PROGRAMS = {
    "collectives, values": Program(_run_values, _check_values),
    "collectives, gradients": Program(_run_gradients, _check_gradients),
    "collectives, adasum": Program(_run_adasum, _check_adasum, sizes=(2, 4)),
    "collectives, names": Program(_run_names, _check_names),
    "collectives in train_step": Program(_run_train_step, _check_train_step),
    "collectives in place": Program(_run_in_place, _check_in_place),
    "collectives refused": Program(_run_refusals, _check_refusals),
    "collectives in process sets": Program(_run_sets, _check_sets, sizes=(4,)),
    "objects": Program(_run_objects, _check_objects),
    "batch normalization": Program(_run_normalization, _check_normalization),
}
