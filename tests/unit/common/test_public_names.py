"""A wrong name gets the right one: where it is, or what it is spelt like."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use


@pytest.mark.parametrize(
    ("module", "name", "right"),
    [
        (hvd, "shard", "hvd.data.shard"),
        (hvd, "DiLoCo", "hvd.sync.DiLoCo"),
        (hvd, "Diloco", "hvd.sync.DiLoCo"),
        (hvd, "MetricAverageCallback", "hvd.callbacks.MetricAverageCallback"),
        (hvd, "KerasState", "hvd.elastic.KerasState"),
        (hvd, "allreduc", "hvd.allreduce"),
        (hvd, "distributed_optimizer", "hvd.DistributedOptimizer"),
        (hvd.sync, "Diloco", "hvd.sync.DiLoCo"),
        (hvd.sync, "DistributedOptimizer", "hvd.DistributedOptimizer"),
        (hvd.callbacks, "DiLoCo", "hvd.sync.DiLoCo"),
        (hvd.callbacks, "AsOneProces", "hvd.callbacks.AsOneProcess"),
        (hvd.data, "steps_per_epochs", "hvd.data.steps_per_epoch"),
        (hvd.elastic, "State_", "hvd.elastic.State"),
    ],
)
def test_the_right_name(module, name, right):
    with pytest.raises(AttributeError) as caught:
        getattr(module, name)
    assert str(caught.value) == (
        f"module {module.__name__!r} has no attribute {name!r}. Did you mean `{right}`?"
    )


@pytest.mark.parametrize("name", ["frobnicate", "__wrapped__", "_repr_html_"])
def test_no_suggestion_where_none_is_near(name):
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}'\.$"):
        getattr(hvd, name)


def test_a_wrong_name_loads_no_tensorflow():
    program = "import sys, hvdext; hasattr(hvdext, 'DiLoCo'); assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hvd.sync.DiLoCo(H=8), r"`hvd.sync.DiLoCo` has no argument `H`. It has: every, outer"),
        (lambda: hvd.sync.LocalSGD("8"), "`every` must be an integer of at least 1. Received: every='8'"),
        (lambda: hvd.sync.SMA(0), "`every` must be .*Received: every=0"),
        (
            lambda: hvd.sync.LocalSGD(8, 2),
            r"at most 1 arguments by position \(every\).*2 besides.*by name: delay",
        ),
        (lambda: hvd.sync.DiLoCo(8, outer="sgd"), "`outer` must be a plain Keras optimizer.*outer='sgd'"),
        (lambda: hvd.sync.LocalSGD(8, wire="fp16"), "wire='fp16'. Did you mean 'float16'"),
        (lambda: hvd.sync.LocalSGD(8, wire="bf16"), "wire='bf16'. Did you mean 'bfloat16'"),
        (lambda: hvd.data.shard(np.zeros(8), np.zeros(8), 2), "batch_size=2.*sample_weight=2"),
        (lambda: hvd.data.shard(np.zeros(8), 2), "batch_size=2.*Received: y=2"),
        (lambda: hvd.data.shard(np.zeros(8), bach_size=2), "`hvd.data.shard` has.*Did you mean `batch_size`"),
        (
            lambda: hvd.callbacks.BroadcastGlobalVariablesCallback(keras.Model()),
            "`root_rank` must be an integer",
        ),
        (
            lambda: hvd.broadcast_variables(keras.Model()),
            "must be a list of .*variables.*Pass its `variables`",
        ),
        (lambda: hvd.broadcast_variables([1.0]), r"`variables` must hold .*Received: \[1.0\]"),
        (lambda: hvd.largest_difference(keras.Model()), "`variables` must be.*Pass its `variables`"),
    ],
)
def test_what_beginners_write(call, message):
    with use(SoloComm()), pytest.raises((TypeError, ValueError), match=message):
        call()
