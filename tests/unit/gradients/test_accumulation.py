"""What micro-batches must have in common, and what a cycle adds up to."""

import keras
import pytest
import tensorflow as tf

from hvdext.gradients.accumulation import Accumulator


def _variables():
    return [keras.Variable([1.0, 2.0], name="first"), keras.Variable([3.0, 4.0], name="second")]


def _slices(value, index):
    return tf.IndexedSlices(tf.constant([value]), tf.constant([index]), tf.constant([2]))


def test_a_cycle_by_hand():
    accumulator, variables = Accumulator(2, average=True), _variables()
    for full in (False, True):
        gradients = [
            tf.constant([1.0, 5.0] if full else [2.0, 1.0]),
            _slices(4.0 if full else 6.0, int(full)),
        ]
        assert bool(accumulator.add(gradients, variables, [False, False])) == full
    dense, sparse = accumulator.take()
    assert dense.numpy().tolist() == [1.5, 3.0]
    assert sparse.values.numpy().tolist() == [3.0, 2.0]
    assert sparse.indices.numpy().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        (None, tf.constant([1.0, 1.0]), ("no", "dense")),
        (tf.constant([1.0, 1.0]), None, ("dense", "no")),
        (tf.constant([1.0, 1.0]), _slices(1.0, 0), ("dense", "sparse")),
    ],
)
def test_another_kind_of_gradient_in_the_second_micro_batch(before, after, kinds):
    accumulator, variables = Accumulator(2, average=False), _variables()
    same = tf.constant([1.0, 1.0])
    accumulator.add([same, before], variables, [False, False])
    with pytest.raises(ValueError, match="`backward_passes_per_step` above 1 needs the same") as caught:
        accumulator.add([same, after], variables, [False, False])
    text = str(caught.value)
    assert text.endswith(
        f"Received: {{'first': 'dense', 'second': '{kinds[1]}'}} "
        f"after {{'first': 'dense', 'second': '{kinds[0]}'}}."
    )


def test_other_variables_in_the_second_micro_batch():
    accumulator, variables = Accumulator(2, average=False), _variables()
    same = tf.constant([1.0, 1.0])
    accumulator.add([same, same], variables, [False, False])
    with pytest.raises(ValueError, match="needs the same variables"):
        accumulator.add([same], variables[:1], [False])
