"""Every public name of `horovod.tensorflow.keras` is there, with its arguments in their order."""

import importlib
import inspect
import subprocess
import sys
import types

import keras
import pytest
import tensorflow as tf

import hvdext as hvd

engine = pytest.importorskip("horovod.tensorflow")

# What `import *` would pick up there from elsewhere.
_FOREIGN = {"K", "is_version_greater_equal_than", "inspect", "keras", "tf", "version", "warnings"}
_MODULES = {
    "horovod.tensorflow.keras": hvd,
    "horovod.tensorflow.keras.callbacks": hvd.callbacks,
    "horovod.tensorflow.keras.elastic": hvd.elastic,
}
_OF_TENSORFLOW = (
    *("DistributedGradientTape", "PartialDistributedGradientTape", "SyncBatchNormalization"),
    *("Adasum", "Min", "Max", "Product", "is_homogeneous", "join"),
    *("broadcast_", "broadcast_object", "broadcast_variables", "allgather_object", "alltoall"),
    *("rank_op", "size_op", "local_rank_op", "local_size_op", "process_set_included_op"),
    *("grouped_allgather", "grouped_allreduce", "grouped_reducescatter", "reducescatter"),
)
# horovod.keras need not import under Keras 3.
_PARTIAL_OPTIMIZER = (
    *("optimizer", "name", "device_dense", "device_sparse", "compression", "sparse_as_dense"),
    *("gradient_predivide_factor", "op", "groups", "process_set", "local_layers", "scale_local_gradients"),
)
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _public(module):
    names = [name for name in dir(module) if not name.startswith("_") and name not in _FOREIGN]
    return [name for name in names if not isinstance(getattr(module, name), types.ModuleType)]


def _theirs():
    """(their module, their name, ours): all of the Keras module, and what its users take from the other."""
    cases = []
    for module_name, ours in _MODULES.items():
        module = importlib.import_module(module_name)
        cases += [(module, name, ours) for name in _public(module)]
    known = {name for _, name, ours in cases if ours is hvd}
    return cases + [(engine, name, hvd) for name in _OF_TENSORFLOW if name not in known]


_THEIRS = _theirs()
_IDS = [f"{module.__name__}.{name}" for module, name, _ in _THEIRS]


def _arguments(value):
    """The names that a caller may pass by position, in order."""
    parameters = inspect.signature(value).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _keywords(value):
    return [p.name for p in inspect.signature(value).parameters.values() if p.kind not in _ANY]


def test_the_list_is_not_empty():
    names = {name for _, name, _ in _THEIRS}
    assert {"init", "DistributedOptimizer", "load_model", "MetricAverageCallback", "KerasState"} <= names
    assert len(names) > 50


@pytest.mark.parametrize(("module", "name", "ours"), _THEIRS, ids=_IDS)
def test_name_and_arguments(module, name, ours):
    theirs, mine = getattr(module, name), getattr(ours, name)
    assert name in ours.__all__
    if callable(theirs):
        expected = _arguments(theirs)
        assert _arguments(mine)[: len(expected)] == expected


def _other_keywords():
    """What `horovod.tensorflow` calls the arguments of functions that both modules have."""
    for name in _public(engine):
        theirs = getattr(engine, name)
        # Its DistributedOptimizer is for the optimizers of tf.compat.v1.
        if inspect.isfunction(theirs) and name in hvd.__all__ and name != "DistributedOptimizer":
            yield from (pytest.param(name, keyword, id=f"{name}-{keyword}") for keyword in _keywords(theirs))


@pytest.mark.parametrize(("name", "keyword"), list(_other_keywords()))
def test_the_other_modules_keywords(name, keyword):
    """Accepted: what is missing, if anything, is another argument."""
    if keyword not in _keywords(getattr(hvd, name)):
        with pytest.raises(Exception) as caught:
            getattr(hvd, name)(**{keyword: None})
        assert f"has no argument `{keyword}`" not in str(caught.value)


def test_partial_optimizer():
    assert tuple(_arguments(hvd.PartialDistributedOptimizer)) == _PARTIAL_OPTIMIZER


@pytest.mark.parametrize("name", ["size", "rank", "included"])
def test_methods_of_a_process_set(name):
    assert callable(getattr(hvd.ProcessSet([0]), name))


# -- wrong keywords ----------------------------------------------------------------------------------


def _callables():
    # Made by hvdext, or by `load`.
    made_otherwise = ("Compression", "Exchanged", "Strategy", "Totals", *_ops())
    for module in (*_MODULES.values(), hvd.sync):
        for name in module.__all__:
            value = getattr(module, name)
            if name in made_otherwise or not callable(value):
                continue
            kinds = {p.kind for p in inspect.signature(value).parameters.values()}
            # Where any keyword is welcome (values of an elastic state, a layer's options), none is wrong.
            if _keywords(value) and inspect.Parameter.VAR_KEYWORD not in kinds:
                yield pytest.param(value, id=f"{module.__name__}.{name}")


def _ops():
    return ("Adasum", "Average", "Max", "Min", "Product", "Sum")


@pytest.mark.parametrize("value", list(_callables()))
def test_a_wrong_keyword_gets_the_nearest(value):
    nearest = max(_keywords(value), key=len)
    with pytest.raises(TypeError, match=f"`{nearest}`|It has: ") as caught:
        value(**{nearest + "x": None})
    assert f"has no argument `{nearest}x`" in str(caught.value)


# -- before init -------------------------------------------------------------------------------------

_X = tf.constant([1.0, 2.0])
_LABELS, _LOGITS = tf.constant([0]), tf.constant([[1.0, 2.0]])
_BEFORE_INIT = {
    "add_process_set": lambda: hvd.add_process_set([0]),
    "allgather": lambda: hvd.allgather(_X),
    "allgather_object": lambda: hvd.allgather_object(1),
    "allreduce": lambda: hvd.allreduce(_X),
    "loss_weight": lambda: hvd.loss_weight(1.0),
    "alltoall": lambda: hvd.alltoall(_X, splits=[2]),
    "barrier": lambda: hvd.barrier(),
    "broadcast": lambda: hvd.broadcast(_X, 0),
    "broadcast_": lambda: hvd.broadcast_([tf.Variable(1.0)], 0),
    "broadcast_global_variables": lambda: hvd.broadcast_global_variables(0),
    "broadcast_object": lambda: hvd.broadcast_object(1),
    "broadcast_variables": lambda: hvd.broadcast_variables([tf.Variable(1.0)], 0),
    "cross_rank": lambda: hvd.cross_rank(),
    "cross_size": lambda: hvd.cross_size(),
    "deploy": lambda: hvd.deploy("model.keras"),
    "evaluate": lambda: hvd.evaluate(_model(), _LOGITS, _LOGITS),
    "grouped_allgather": lambda: hvd.grouped_allgather([_X]),
    "grouped_allreduce": lambda: hvd.grouped_allreduce([_X]),
    "grouped_reducescatter": lambda: hvd.grouped_reducescatter([_X]),
    "is_homogeneous": lambda: hvd.is_homogeneous(),
    "join": lambda: hvd.join(),
    "largest_difference": lambda: hvd.largest_difference([tf.Variable(1.0)]),
    "local_rank": lambda: hvd.local_rank(),
    "local_rank_op": lambda: hvd.local_rank_op(),
    "local_size": lambda: hvd.local_size(),
    "local_size_op": lambda: hvd.local_size_op(),
    "mpi_threads_supported": lambda: hvd.mpi_threads_supported(),
    "predict": lambda: hvd.predict(_model(), _LOGITS),
    "process_set_included_op": lambda: hvd.process_set_included_op(),
    "rank": lambda: hvd.rank(),
    "rank_op": lambda: hvd.rank_op(),
    "reducescatter": lambda: hvd.reducescatter(_X),
    "remove_process_set": lambda: hvd.remove_process_set(hvd.ProcessSet([0])),
    "size": lambda: hvd.size(),
    "size_op": lambda: hvd.size_op(),
    "start_timeline": lambda: hvd.start_timeline("timeline.json"),
    "stop_timeline": lambda: hvd.stop_timeline(),
    "traffic": lambda: hvd.traffic(),
    "verbose": lambda: hvd.verbose(),
    # These can be made before init; it is the first step that needs it.
    "DistributedGradientTape": lambda: _gradient(hvd.DistributedGradientTape(tf.GradientTape())),
    "DistributedOptimizer": lambda: _step(hvd.DistributedOptimizer(keras.optimizers.SGD())),
    "PartialDistributedGradientTape": lambda: _gradient(
        hvd.PartialDistributedGradientTape(tf.GradientTape())
    ),
    "PartialDistributedOptimizer": lambda: _step(hvd.PartialDistributedOptimizer(keras.optimizers.SGD())),
    "SyncBatchNormalization": lambda: hvd.SyncBatchNormalization()(tf.ones((2, 3)), training=True),
    # Layers that are cut, and models that are.
    "ColumnDense": lambda: hvd.ColumnDense(2)(_LOGITS),
    "Grid": lambda: hvd.Grid(),
    "RowDense": lambda: hvd.RowDense(2)(_LOGITS),
    "SlicedConv2D": lambda: hvd.SlicedConv2D(2, 1)(tf.ones((1, 2, 2, 1))),
    "SlicedDropout": lambda: hvd.SlicedDropout(0.5)(_LOGITS, training=True),
    "SlicedEmbedding": lambda: hvd.SlicedEmbedding(2, 2)(_LABELS),
    "SlicedGroupQueryAttention": lambda: hvd.SlicedGroupQueryAttention(2, 2, 2)(*[tf.ones((1, 2, 3))] * 2),
    "SlicedMultiHeadAttention": lambda: hvd.SlicedMultiHeadAttention(2, 2)(*[tf.ones((1, 2, 3))] * 2),
    "SlicedSparseCategoricalAccuracy": lambda: hvd.SlicedSparseCategoricalAccuracy()(_LABELS, _LOGITS),
    "SlicedSparseCategoricalCrossentropy": lambda: hvd.SlicedSparseCategoricalCrossentropy()(
        _LABELS, _LOGITS
    ),
    "load_uncut": lambda: hvd.load_uncut(_model(), "model.keras"),
    "pipeline": lambda: hvd.pipeline(_model(), hvd.plan(_model(), 1), 1),
    "save_uncut": lambda: hvd.save_uncut(_model(), "model.keras"),
    "slice_layers": lambda: hvd.slice_layers(_model(), {"cut": "column"}),
}
# Settings, what ends or begins a job, and questions about the engine.
_WITHOUT_INIT = {
    *_ops(),
    *("Compression", "ProcessSet", "global_process_set", "init", "is_initialized", "load_model", "run"),
    *("callbacks", "data", "elastic", "engine", "shutdown", "Strategy", "sync"),
    *("ccl_built", "cuda_built", "ddl_built", "gloo_built", "gloo_enabled", "mpi_built", "mpi_enabled"),
    *("nccl_built", "rocm_built"),
    *("Plan", "place", "plan"),
}


def _model():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="cut")])


def _gradient(tape):
    source = tf.Variable(1.0)
    with tape:
        loss = 2.0 * source
    return tape.gradient(loss, [source])


def _step(optimizer):
    optimizer.apply([tf.constant(1.0)], [keras.Variable(1.0)])


def test_every_name_is_one_or_the_other():
    assert set(_BEFORE_INIT) | _WITHOUT_INIT == set(hvd.__all__)


@pytest.mark.parametrize("name", _BEFORE_INIT)
def test_before_init(name):
    hvd.shutdown()
    with pytest.raises(RuntimeError, match=r"hvdext has not been initialised: call `hvd.init\(\)`"):
        _BEFORE_INIT[name]()


# -- one changed line --------------------------------------------------------------------------------


def test_names_load_on_first_use():
    """`import hvdext` alone starts no TensorFlow; the command line relies on it."""
    code = "import sys, hvdext; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
