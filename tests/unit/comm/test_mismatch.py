"""`MismatchError` is what scripts catch, also where AutoGraph, Keras or pickle make it anew."""

import pickle

import keras
import pytest
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.mismatch import MismatchError, mismatch
from hvdext.testing import run_ranks

_CAUGHT = (ValueError, tf.errors.FailedPreconditionError, tf.errors.InvalidArgumentError)


@pytest.mark.parametrize("caught", _CAUGHT)
def test_ranks_that_differ_raise_what_scripts_for_horovod_catch(caught):
    def program(comm):
        with pytest.raises(caught, match=r"disagree about the cake:\n  sugar: rank 0: 0; rank 1: 1"):
            agreement.check(comm, "the cake", {"sugar": comm.rank})

    run_ranks(2, program)


class _Failing(keras.layers.Layer):
    def call(self, x):
        raise mismatch("`x` must fit")


def _fail(x):
    if x is not None:
        raise mismatch("`x` must fit")


@pytest.mark.parametrize("function", [tf.function(_fail), _Failing()])
def test_it_keeps_its_class_where_its_message_is_extended(function):
    with pytest.raises(MismatchError, match="`x` must fit"):
        function(tf.ones([1]))


def test_it_travels_between_processes():
    error = pickle.loads(pickle.dumps(mismatch("`x` must fit")))
    assert type(error) is MismatchError
    assert str(error) == "`x` must fit"
