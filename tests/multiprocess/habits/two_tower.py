"""A recommender of two towers: the other items of the batch, gathered, are what a user did not want.

After https://keras.io/keras_rs/examples/basic_retrieval; the tables' gradients are sparse.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.multiprocess.habits.way import weights_of

BATCH, USERS, ITEMS, WIDTH = 8, 13, 17, 4


class Retrieval(keras.Model):
    def __init__(self, gather):
        super().__init__()
        self.users = layers.Embedding(USERS, WIDTH)
        self.items = keras.Sequential([layers.Embedding(ITEMS, WIDTH), layers.Dense(WIDTH)])
        self._gather = gather

    def call(self, inputs):
        return self.users(inputs["user"]), self.items(inputs["item"])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        users, items = y_pred
        scores = ops.matmul(users, ops.transpose(self._gather(items)))
        mine = ops.cast(x["row"][:, None] == self._gather(x["row"])[None], "float32")
        return ops.mean(keras.losses.categorical_crossentropy(mine, scores, from_logits=True))


def main(way):
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    rows = 4 * BATCH
    x = {
        "user": random.integers(0, USERS, rows),
        "item": random.integers(0, ITEMS, rows),
        "row": np.arange(rows),
    }
    model = Retrieval(way.gather)
    model({key: value[:1] for key, value in x.items()})
    model.compile(optimizer=way.optimizer(keras.optimizers.Adagrad(0.1)))
    shares = {key: way.share(value) for key, value in x.items()}
    data = tf.data.Dataset.from_tensor_slices(shares).batch(BATCH // way.size)
    history = model.fit(data, epochs=2, verbose=0, callbacks=list(way.callbacks))
    return {"weights": weights_of(model), "logs": history.history}
