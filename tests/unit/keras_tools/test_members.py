"""Whose optimizer updates what: members of a `MultiOptimizer`, what is inside a `LossScaleOptimizer`."""

import keras
import pytest

from hvdext.keras_tools.optimizers import members_of, updaters_of, with_members


def _sgd():
    return keras.optimizers.SGD(0.1)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer])
def test_a_single_optimizer(wrap):
    inside = _sgd()
    assert members_of(wrap(inside)) == []
    assert with_members(wrap(inside)) == [inside]
    assert updaters_of(wrap(inside)) == [inside]


needs_multi = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer"
)


@needs_multi
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer])
def test_members_are_listed(wrap):
    one, other = _sgd(), _sgd()
    multi = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(one, {"kernel": other}))
    assert set(members_of(wrap(multi))) == {one, other}
    assert with_members(wrap(multi))[0] is multi
    assert with_members(wrap(multi))[1:] == members_of(multi)
    assert updaters_of(wrap(multi)) == members_of(multi)


@needs_multi
def test_a_function_chooses_members_as_late_as_the_build():
    member = _sgd()
    multi = keras.optimizers.MultiOptimizer(lambda variable: member)
    assert members_of(multi) == updaters_of(multi) == []
    multi.build([keras.Variable([1.0], name="v")])
    assert members_of(multi) == updaters_of(multi) == [member]
