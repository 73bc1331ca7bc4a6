"""What a call of a function moves is read off its graph."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext.keras_tools.moving import moving

random = keras.random


def read(function, but=()):
    return moving(tf.function(function, autograph=False).get_concrete_function(tf.zeros(3)), but)


def test_draws_are_counted_also_in_functions_within():
    generator = random.SeedGenerator(5)
    inner = tf.function(lambda x: x + random.normal((3,), seed=generator), autograph=False)
    found = read(lambda x: inner(inner(x)) * random.uniform((3,), seed=generator))
    (one,) = found.generators
    assert one.draws == 3
    assert (found.others, found.operations, found.uncountable) == ([], [], [])


@pytest.mark.parametrize("is_ordered", [True, False])
def test_states_are_those_that_keras_makes(is_ordered):
    generator = random.SeedGenerator(5)

    def drawn(x):
        return (
            x + tf.cast(generator.next(ordered=is_ordered) + generator.next(ordered=is_ordered), x.dtype)[:1]
        )

    (one,) = read(drawn).generators
    begin = generator.state.numpy()
    expected = random.SeedGenerator(5)
    for _ in range(2 * 7):
        expected.next(ordered=is_ordered)
    np.testing.assert_array_equal(one.after(begin, 7), expected.state.numpy())
    assert one.is_ordered == is_ordered


def test_what_cannot_be_followed():
    generator, counter = random.SeedGenerator(5), keras.Variable(0.0, name="counter")

    def in_a_loop(x):
        return tf.while_loop(
            lambda x: tf.reduce_sum(x) < 3, lambda x: (x + random.uniform((3,), seed=generator),), (x,)
        )

    def counting(x):
        counter.assign_add(1.0)
        return x * counter

    numbers = tf.random.Generator.from_seed(3)
    assert len(read(in_a_loop).uncountable) == 1
    assert read(counting).others == ["counter"]
    assert read(counting, [counter]).others == []
    assert len(read(lambda x: x + numbers.normal((3,))).others) == 1
    assert read(lambda x: tf.random.shuffle(x) + tf.random.normal((3,))).operations == [
        "RandomShuffle",
        "RandomStandardNormal",
    ]
    assert read(lambda x: x + tf.random.stateless_normal((3,), (1, 2))).operations == []
