"""Classes of models that several threads make the first model of."""

import keras
from keras.src.models import model as models

from hvdext.keras_tools.in_threads import make_functional_in_turn


def test_a_class_that_another_thread_has_made_functional_stays():
    """What a thread meets that has looked before another one was done."""
    make_functional_in_turn()

    class Base(keras.Model):
        pass

    class Own(Base):
        pass

    x = keras.Input((2,))
    y = keras.layers.Dense(1)(x)
    made = Own(x, y)
    assert models.inject_functional_model_class(Own) is Own  # Keras' own: TypeError, an inheritance cycle
    assert Own(x, y).output_shape == made.output_shape == (None, 1)
