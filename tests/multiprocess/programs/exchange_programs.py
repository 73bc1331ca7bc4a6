"""Gradients chosen by hand go in, NumPy says what must come out. The same for threads and for horovodrun.

Every program is a pair: `run(hvd)` on each rank, `check(ranks)` on what the ranks returned, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

SHAPES = [(3, 4), (5,), (1,), (7, 3)]
NAMES = ["first_kernel", "first_bias", "scale", "last_kernel"]


@dataclass(frozen=True)
class Program:
    """`sizes`: with how many ranks it makes sense."""

    run: Callable
    check: Callable
    sizes: tuple[int, ...] = (2, 3, 4)


def gradients_of(rank, seed=0):
    """Float64 gradients that differ from rank to rank."""
    generator = np.random.default_rng([seed, rank])
    return [generator.normal(size=shape) for shape in SHAPES]


def applied(hvd, gradients, dtype="float64", **options):
    """What SGD with learning rate 1 subtracts: the combined gradients, seen through Keras' own `apply`."""
    variables = make_variables(dtype)
    apply_sgd(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), **options), gradients, variables)
    return [-variable.numpy() for variable in variables]


def make_variables(dtype="float64"):
    return [
        keras.Variable(np.zeros(shape), dtype=dtype, name=name)
        for name, shape in zip(NAMES, SHAPES, strict=True)
    ]


def apply_sgd(optimizer, gradients, variables):
    tensors = [
        None if g is None else tf.constant(g, v.dtype) for g, v in zip(gradients, variables, strict=True)
    ]
    optimizer.apply(tensors, variables)


def everyone(size, seed=0):
    return [gradients_of(rank, seed) for rank in range(size)]


def mean(gradients):
    return [np.mean(column, axis=0) for column in zip(*gradients, strict=True)]


def total(gradients):
    return [np.sum(column, axis=0) for column in zip(*gradients, strict=True)]


def assert_same(ranks):
    for rank in ranks[1:]:
        for mine, first in zip(rank, ranks[0], strict=True):
            np.testing.assert_array_equal(mine, first)


def assert_all(ranks, expected, tolerance=1e-14):
    """All ranks hold the same bits, and these are `expected`."""
    assert_same(ranks)
    for value, wanted in zip(ranks[0], expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance)


# -- op, predivide, groups -----------------------------------------------------------------------------


def _variant(expected, tolerance=1e-14, dtype="float64", sizes=(2, 3, 4), **options):
    """A program with options of the optimizer; a function makes its option out of hvdext."""

    def run(hvd):
        chosen = {key: make(hvd) if callable(make) else make for key, make in options.items()}
        return applied(hvd, gradients_of(hvd.rank()), dtype, **chosen)

    return Program(
        run, lambda ranks: assert_all(ranks, expected(everyone(len(ranks))), tolerance), sizes=sizes
    )


def _run_grouped_lists(hvd):
    variables = make_variables()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), groups=[[variables[0], variables[3]], [variables[1]]]
    )
    before = grad_calls(hvd)
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)
    return {"values": [-v.numpy() for v in variables], "calls": grad_calls(hvd) - before}


def grad_calls(hvd):
    traffic = hvd.traffic()
    return traffic["grad"].calls if "grad" in traffic else 0


def _check_grouped_lists(ranks):
    assert_all([rank["values"] for rank in ranks], mean(everyone(len(ranks))))
    # The two lists, and the variable that is in neither.
    assert [rank["calls"] for rank in ranks] == [3] * len(ranks)


def _run_number_of_groups(hvd):
    before = grad_calls(hvd)
    values = applied(hvd, gradients_of(hvd.rank()), groups=2)
    return {"values": values, "calls": grad_calls(hvd) - before}


def _check_number_of_groups(ranks):
    assert_all([rank["values"] for rank in ranks], mean(everyone(len(ranks))))
    assert [rank["calls"] for rank in ranks] == [2] * len(ranks)


# -- Adasum --------------------------------------------------------------------------------------------


def adasum_of(vectors):
    """The definition: pairs of neighbours, then pairs of pairs."""
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2
    a, b = adasum_of(vectors[:half]), adasum_of(vectors[half:])
    dot = np.sum(a * b)
    return (1 - dot / (2 * np.sum(a * a))) * a + (1 - dot / (2 * np.sum(b * b))) * b


def adasum_of_all(gradients):
    return [adasum_of(list(column)) for column in zip(*gradients, strict=True)]


def _orthogonal(rank):
    """Disjoint places of every tensor; a tensor with a single place has it on rank 0 only."""
    parts = [np.zeros(shape) for shape in SHAPES]
    for part in parts:
        part.reshape(-1)[rank::4] = rank + 1.0
    return parts


def _run_adasum_limits(hvd):
    op = hvd.Adasum
    parallel = [(hvd.rank() + 1) * g for g in gradients_of(0)]
    return {
        "orthogonal": applied(hvd, _orthogonal(hvd.rank()), op=op),
        "equal": applied(hvd, gradients_of(0), op=op),
        "parallel": applied(hvd, parallel, op=op),
        "zero": applied(hvd, [0 * g for g in gradients_of(0)], op=op),
    }


def _check_adasum_limits(ranks):
    size = len(ranks)
    assert_all([rank["orthogonal"] for rank in ranks], total([_orthogonal(r) for r in range(size)]))
    assert_all([rank["equal"] for rank in ranks], gradients_of(0))
    # a and k*a: (1 - k/2) a + (1 - 1/(2k)) k a = (k + 1)/2 a, the mean; for four ranks the mean of means.
    assert_all([rank["parallel"] for rank in ranks], [(size + 1) / 2 * g for g in gradients_of(0)])
    assert_all([rank["zero"] for rank in ranks], [0 * g for g in gradients_of(0)])


# -- fp16 ----------------------------------------------------------------------------------------------


def _run_fp16(hvd):
    before = hvd.traffic()["grad"].bytes if "grad" in hvd.traffic() else 0
    values = applied(hvd, gradients_of(hvd.rank()), "float32", compression=hvd.Compression.fp16)
    return {"values": values, "bytes": hvd.traffic()["grad"].bytes - before}


def _check_fp16(ranks):
    size = len(ranks)
    assert_same([rank["values"] for rank in ranks])
    columns = zip(*everyone(size), strict=True)
    for value, column in zip(ranks[0]["values"], columns, strict=True):
        exact, magnitude = np.mean(column, axis=0), np.mean(np.abs(column), axis=0)
        # Half a unit in the last of 11 bits for each value sent; with more than two ranks the sum is
        # sent, too. A little on top for float32.
        bound = 2.0**-11 * 1.01 * (magnitude + (np.abs(exact) + 1e-3 if size > 2 else 0)) + 2.0**-24
        error = np.abs(value - exact)
        assert np.all(error <= bound)
        assert np.max(error) > 1e-6  # it did travel as float16
    # 39 float16 values and 32 of the pattern, padded to equal shards where they are cut.
    padded = 39 + 32 if size == 2 else -(-(39 + 32) // size) * size
    assert [rank["bytes"] for rank in ranks] == [2 * padded * 2 * (size - 1) // size] * size


# -- sparse gradients and None -------------------------------------------------------------------------


def slices_of(rank):
    """As many rows as the rank's number plus one, with repeats, of a (7, 3) gradient."""
    generator = np.random.default_rng([1, rank])
    return generator.normal(size=(rank + 1, 3)), generator.integers(0, 3, size=rank + 1)


def _dense_of(rank):
    values, indices = slices_of(rank)
    dense = np.zeros((7, 3))
    np.add.at(dense, indices, values)
    return dense


def _apply_slices(hvd, **options):
    variable = keras.Variable(np.zeros((7, 3)), dtype="float64", name="table")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), **options)
    values, indices = slices_of(hvd.rank())
    optimizer.apply(
        [tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([7, 3]))], [variable]
    )
    return -variable.numpy()


def _run_sparse(hvd):
    return {
        "average": _apply_slices(hvd),
        "sum": _apply_slices(hvd, op=hvd.Sum),
        "as dense": _apply_slices(hvd, sparse_as_dense=True),
        "fp16": _apply_slices(hvd, compression=hvd.Compression.fp16),
    }


def _check_sparse(ranks):
    everything = [_dense_of(rank) for rank in range(len(ranks))]
    for key, expected, tolerance in [
        ("average", np.mean(everything, axis=0), 1e-14),
        ("sum", np.sum(everything, axis=0), 1e-14),
        ("as dense", np.mean(everything, axis=0), 1e-14),
        ("fp16", np.mean(everything, axis=0), 2.0**-11 * 10),
    ]:
        assert_all([[rank[key]] for rank in ranks], [expected], tolerance)


def _run_none(hvd):
    gradients = gradients_of(hvd.rank())
    gradients[0] = gradients[2] = None
    return applied(hvd, gradients)  # Keras warns of gradients that do not exist


def _check_none(ranks):
    expected = mean(everyone(len(ranks)))
    assert_all(ranks, [np.zeros(SHAPES[0]), expected[1], np.zeros(SHAPES[2]), expected[3]])


# -- a part of the parameters --------------------------------------------------------------------------


def _run_selected(hvd):
    gradients = gradients_of(hvd.rank())
    variables = make_variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.register_local_var(variables[1])
    apply_sgd(optimizer, gradients, variables)
    return {
        "pattern": applied(hvd, gradients, select="*_kernel"),
        "patterns": applied(hvd, gradients, select=["first_kernel", "last_*"]),
        "predicate": applied(hvd, gradients, select=lambda v: len(v.shape) == 2),
        "unscaled": applied(hvd, gradients, select="*_kernel", scale_local_gradients=False),
        "registered": [-v.numpy() for v in variables],
    }


def _check_selected(ranks):
    size = len(ranks)
    expected = mean(everyone(size))
    for rank, result in enumerate(ranks):
        mine = gradients_of(rank)
        scaled = [expected[0], mine[1] / size, mine[2] / size, expected[3]]
        for key in ("pattern", "patterns", "predicate"):
            assert_all([result[key]], scaled)
        assert_all([result["unscaled"]], [expected[0], mine[1], mine[2], expected[3]])
        assert_all([result["registered"]], [expected[0], mine[1] / size, expected[2], expected[3]])


def _run_clipped(hvd):
    variables = make_variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0, clipnorm=0.5), select="*_kernel")
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)
    return [-v.numpy() for v in variables]


def _check_clipped(ranks):
    """Each gradient is shortened by its own norm, so that the exchanged ones stay alike."""
    size = len(ranks)
    expected = mean(everyone(size))
    for rank, result in enumerate(ranks):
        mine = gradients_of(rank)
        whole = [expected[0], mine[1] / size, mine[2] / size, expected[3]]
        assert_all([result], [g * min(1, 0.5 / np.sqrt(np.sum(g * g))) for g in whole])


def _run_overwritten(hvd):
    variables = make_variables()
    variables[1].overwrite_with_gradient = variables[3].overwrite_with_gradient = True
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.register_local_var(variables[1])
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)
    return [v.numpy() for v in variables]


def _check_overwritten(ranks):
    """A variable whose gradient is its next value: the rank's own as it is, or the largest of all ranks."""
    everything = everyone(len(ranks))
    averaged = mean(everything)
    largest = np.max([gradients[3] for gradients in everything], axis=0)
    for rank, result in enumerate(ranks):
        assert_all([result], [-averaged[0], gradients_of(rank)[1], -averaged[2], largest])


# -- process sets --------------------------------------------------------------------------------------

SETS = [(0, 2), (1, 3)]


def _run_process_set(hvd):
    mine = next(hvd.ProcessSet(ranks) for ranks in SETS if hvd.rank() in ranks)
    return {
        "average": applied(hvd, gradients_of(hvd.rank()), process_set=mine),
        "adasum": applied(hvd, gradients_of(hvd.rank()), process_set=mine, op=hvd.Adasum),
        "place": [mine.rank(), mine.size(), mine.included()],
    }


def _check_process_set(ranks):
    for members in SETS:
        gradients = [gradients_of(rank) for rank in members]
        assert_all([ranks[r]["average"] for r in members], mean(gradients))
        assert_all([ranks[r]["adasum"] for r in members], adasum_of_all(gradients))
        for place, rank in enumerate(members):
            assert ranks[rank]["place"] == [place, 2, True]


# -- the tape ------------------------------------------------------------------------------------------


def _run_tape(hvd):
    gradients = [tf.constant(g) for g in gradients_of(hvd.rank())]
    sources = {
        name: tf.Variable(tf.ones(s, tf.float64), name=name) for name, s in zip(NAMES, SHAPES, strict=True)
    }
    unused = tf.Variable(1.0, name="unused")

    def step(local, **options):
        with hvd.DistributedGradientTape(tf.GradientTape(), **options) as tape:
            products = [g * v for g, v in zip(gradients, sources.values(), strict=True)]
            loss = tf.add_n([tf.reduce_sum(product) for product in products])
        if local:
            tape.register_local_source(sources["scale"])
        found, none = tape.gradient(loss, [sources, unused])
        assert none is None
        return found

    def values(found):
        return [found[name].numpy() for name in NAMES]

    return {
        "eager": values(step(False)),
        "sum": values(tf.function(lambda: step(False, op=hvd.Sum))()),
        "local": values(step(True)),
    }


def _check_tape(ranks):
    size = len(ranks)
    everything = everyone(size)
    assert_all([rank["eager"] for rank in ranks], mean(everything))
    assert_all([rank["sum"] for rank in ranks], total(everything))
    for number, rank in enumerate(ranks):
        expected = mean(everything)
        expected[2] = gradients_of(number)[2] / size
        assert_all([rank["local"]], expected)


def _run_two_tapes(hvd):
    """What goes out under the same name must be the same, also where the sources are."""
    from hvdext.comm.current import current

    source = tf.Variable([1.0, 2.0], name="two_tapes")
    known = set(current().ledger.progress())
    found = []
    for op in (hvd.Average, hvd.Sum, hvd.Average):
        with hvd.DistributedGradientTape(tf.GradientTape(), op=op) as tape:
            loss = (hvd.rank() + 1.0) * tf.reduce_sum(source)
        found.append(tape.gradient(loss, [source])[0].numpy())
    runs = {name: runs for name, runs in current().ledger.progress().items() if name not in known}
    grads = {name: runs[0] for name, runs in runs.items() if name.startswith("hvdext.grad.tape-")}
    return {"found": found, "runs": grads}


def _check_two_tapes(ranks):
    size = len(ranks)
    summed = size * (size + 1) / 2
    expected = [np.full(2, value) for value in (summed / size, summed, summed / size)]
    assert_all([rank["found"] for rank in ranks], expected, 1e-6)
    assert sorted(ranks[0]["runs"].values()) == [1, 2]
    assert all(rank["runs"] == ranks[0]["runs"] for rank in ranks)


# -- variables -----------------------------------------------------------------------------------------


def _run_broadcast(hvd):
    keras_variable = keras.Variable(np.full((2, 2), hvd.rank() + 1.0), dtype="float64", name="keras_variable")
    integers = tf.Variable([hvd.rank(), 10 * hvd.rank()], name="integers")
    half = tf.Variable(tf.cast([hvd.rank() + 0.5], tf.bfloat16), name="half")
    flag = tf.Variable(hvd.rank() == 1, name="flag")
    variables = [keras_variable, integers, half, flag]
    apart = hvd.largest_difference(variables)
    hvd.broadcast_variables(variables, root_rank=1)
    values = [np.asarray(tf.cast(tf.convert_to_tensor(v), tf.float64)) for v in variables]
    return {"apart": apart, "values": values, "after": hvd.largest_difference(variables)}


def _check_broadcast(ranks):
    size = len(ranks)
    for rank in ranks:
        assert rank["apart"] == 10 * (size - 1)  # the second integer
        assert rank["after"] == 0.0
        for value, expected in zip(rank["values"], [np.full((2, 2), 2), [1, 10], [1.5], True], strict=True):
            np.testing.assert_array_equal(value, expected)


PROGRAMS = {
    "average": _variant(mean),
    "average, float32": _variant(mean, 1e-6, "float32"),
    "sum": _variant(total, op=lambda hvd: hvd.Sum),
    "predivided": _variant(mean, gradient_predivide_factor=3.0),
    "predivided, float32": _variant(mean, 1e-6, "float32", gradient_predivide_factor=4),
    "one group": _variant(mean, groups=1),
    "two groups": Program(_run_number_of_groups, _check_number_of_groups),
    "groups as lists": Program(_run_grouped_lists, _check_grouped_lists),
    "adasum": _variant(adasum_of_all, 1e-13, sizes=(2, 4), op=lambda hvd: hvd.Adasum),
    "adasum, float32": _variant(adasum_of_all, 2e-6, "float32", sizes=(2, 4), op=lambda hvd: hvd.Adasum),
    "adasum limits": Program(_run_adasum_limits, _check_adasum_limits, sizes=(2, 4)),
    "fp16": Program(_run_fp16, _check_fp16),
    "float16 gradients": _variant(mean, 4e-3, "float16"),
    "bfloat16 gradients": _variant(mean, 4e-2, "bfloat16"),
    "sparse": Program(_run_sparse, _check_sparse),
    "none": Program(_run_none, _check_none),
    "selected": Program(_run_selected, _check_selected),
    "clipnorm with a local part": Program(_run_clipped, _check_clipped),
    "overwritten variables": Program(_run_overwritten, _check_overwritten),
    "process sets": Program(_run_process_set, _check_process_set, sizes=(4,)),
    "tape": Program(_run_tape, _check_tape),
    "tapes with different op": Program(_run_two_tapes, _check_two_tapes),
    "broadcast": Program(_run_broadcast, _check_broadcast),
}
