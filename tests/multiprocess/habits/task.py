"""A task with its preprocessor: `fit`, `evaluate` and `predict` take raw text, as KerasHub's do.

After https://keras.io/keras_hub/api/base_classes/task.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tests.multiprocess.habits.way import weights_of

BATCH, WORDS, LENGTH = 8, 10, 4


class Task(keras.Sequential):
    """Everything is tokenized on its way in."""

    def preprocess(self, text):
        words = tf.strings.split(text).to_tensor("", shape=(None, LENGTH))
        return tf.strings.to_hash_bucket_fast(words, WORDS)

    def _preprocessed(self, x, y=None, batch_size=32):
        data = tf.data.Dataset.from_tensor_slices(np.asarray(x) if y is None else (np.asarray(x), y))
        data = data.batch(batch_size)
        if y is None:
            return data.map(self.preprocess)
        return data.map(lambda x, y: (self.preprocess(x), y))

    def fit(self, x=None, y=None, batch_size=32, **options):
        return super().fit(self._preprocessed(x, y, batch_size), **options)

    def evaluate(self, x=None, y=None, batch_size=32, **options):
        return super().evaluate(self._preprocessed(x, y, batch_size), **options)

    def predict(self, x, batch_size=32, **options):
        return super().predict(self._preprocessed(x, None, batch_size), **options)


def main(way):
    keras.utils.set_random_seed(1)
    task = Task(
        [
            keras.Input((LENGTH,), dtype="int64"),
            layers.Embedding(WORDS, 4),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )
    task.compile(way.optimizer(keras.optimizers.Adam(1e-2)), "mse")
    random = np.random.default_rng(0)
    words = np.array(["red", "green", "blue", "sky", "sea", "sun"])
    x = np.array([" ".join(random.choice(words, LENGTH)) for _ in range(4 * BATCH)])
    y = random.normal(size=(len(x), 1)).astype("float32")
    history = task.fit(
        way.share(x), way.share(y), BATCH // way.size, epochs=2, verbose=0, callbacks=list(way.callbacks)
    )
    return {
        "weights": weights_of(task),
        "logs": history.history,
        "predicted": way.predict(task, x[:13], batch_size=4),
        "evaluated": list(way.evaluate(task, x[:13], y[:13], batch_size=4).values()),
    }
