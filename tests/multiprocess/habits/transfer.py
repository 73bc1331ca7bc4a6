"""Transfer learning in two phases: the head alone, then all of it with a small rate, compiled anew.

After https://keras.io/guides/transfer_learning.
"""

import keras
import numpy as np
from keras import layers

from tests.multiprocess.habits.way import weights_of

BATCH = 8


def main(way):
    keras.utils.set_random_seed(1)
    features = keras.Input((6,))
    norm = layers.BatchNormalization()
    base = keras.Model(features, layers.ReLU()(norm(layers.Dense(8)(features))), name="base")
    inputs = keras.Input((6,))
    outputs = layers.Dense(1, name="head")(base(inputs, training=False))
    model = keras.Model(inputs, outputs)

    random = np.random.default_rng(0)
    x = random.normal(size=(4 * BATCH, 6)).astype("float32")
    y = x[:, :1] * x[:, 1:2]
    arguments = {"batch_size": BATCH // way.size, "epochs": 2, "shuffle": False, "verbose": 0}

    base.trainable = False
    model.compile(way.optimizer(keras.optimizers.Adam(1e-2)), "mse", metrics=["mae"])
    first = model.fit(way.share(x), way.share(y), callbacks=list(way.callbacks), **arguments)
    base.trainable = True
    norm.trainable = False  # as the guide has it: its statistics stay
    model.compile(way.optimizer(keras.optimizers.Adam(1e-3)), "mse", metrics=["mae"])
    second = model.fit(way.share(x), way.share(y), callbacks=list(way.callbacks), **arguments)
    logs = {key: first.history[key] + second.history[key] for key in first.history}
    return {"weights": weights_of(model), "logs": logs}
