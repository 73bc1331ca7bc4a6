"""SimCLR: every image is told apart from those of the whole batch, whose embeddings are gathered.

After https://keras.io/examples/vision/semisupervised_simclr.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.multiprocess.habits.way import weights_of

BATCH, TEMPERATURE = 8, 0.2


class Contrastive(keras.Model):
    """Args: encoder: images to embeddings. gather: rows of one rank to those of all; place: of the first."""

    def __init__(self, encoder, gather):
        super().__init__()
        self.encoder, self._gather = encoder, gather

    def train_step(self, data):
        one, other, place = data
        with tf.GradientTape() as tape:
            a, b = (ops.normalize(self.encoder(view, training=True), axis=1) for view in (one, other))
            everyone_a, everyone_b, places = self._gather(a), self._gather(b), self._gather(place)
            mine = ops.argmax(ops.cast(place[:, None] == places[None], "int32"), axis=1)
            losses = [
                keras.losses.sparse_categorical_crossentropy(
                    mine, ops.matmul(rows, ops.transpose(columns)) / TEMPERATURE, from_logits=True
                )
                for rows, columns in ((a, everyone_b), (b, everyone_a))
            ]
            loss = ops.mean(ops.concatenate(losses))
        gradients = tape.gradient(loss, self.encoder.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.encoder.trainable_weights, strict=True))
        return {"loss": loss}


def main(way):
    keras.utils.set_random_seed(1)
    encoder = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(4)])
    random = np.random.default_rng(0)
    rows = 4 * BATCH
    image = random.normal(size=(rows, 6))
    views = [image + 0.1 * random.normal(size=image.shape) for _ in range(2)]
    parts = (*(way.share(view).astype("float32") for view in views), way.share(np.arange(rows)))
    data = tf.data.Dataset.from_tensor_slices(parts).batch(BATCH // way.size)
    model = Contrastive(encoder, way.gather)
    model.compile(optimizer=way.optimizer(keras.optimizers.Adam(1e-2)))
    history = model.fit(data, epochs=2, verbose=0, callbacks=list(way.callbacks))
    return {"weights": weights_of(encoder), "logs": {"loss": history.history["loss"]}}
