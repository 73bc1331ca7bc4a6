"""Wide and deep: crossed features as sparse rows beside embeddings of the same example.

After https://keras.io/examples/structured_data/wide_deep_cross_networks, on `sparse=True` inputs.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tests.multiprocess.habits.way import weights_of

BATCH, WORDS, CROSSES = 16, 9, 30


def main(way):
    keras.utils.set_random_seed(1)
    wide = keras.Input((CROSSES,), sparse=True, name="wide")
    deep = keras.Input((2,), dtype="int32", name="deep")
    embedded = layers.Flatten()(layers.Embedding(WORDS, 3)(deep))
    hidden = layers.Dense(6, activation="relu")(embedded)
    joined = layers.Concatenate()([layers.Dense(2, name="crosses")(wide), hidden])
    model = keras.Model([wide, deep], layers.Dense(1, activation="sigmoid")(joined))
    model.compile(way.optimizer(keras.optimizers.Adam(1e-2)), "binary_crossentropy")

    random = np.random.default_rng(0)
    rows = 4 * BATCH
    crosses = (random.random((rows, CROSSES)) < 0.2).astype("float32")
    words = random.integers(0, WORDS, (rows, 2)).astype("int32")
    y = random.integers(0, 2, (rows, 1)).astype("float32")
    shares = tuple(way.share(part) for part in (crosses, words, y))
    data = tf.data.Dataset.from_tensor_slices(shares).batch(BATCH // way.size)
    data = data.map(lambda wide, deep, y: ({"wide": tf.sparse.from_dense(wide), "deep": deep}, y))
    history = model.fit(data, epochs=2, verbose=0, callbacks=list(way.callbacks))
    return {"weights": weights_of(model), "logs": history.history}
