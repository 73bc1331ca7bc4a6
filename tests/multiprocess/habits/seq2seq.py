"""Translation of padded sequences: losses are means over tokens, of which every rank has another number.

After https://keras.io/examples/nlp/lstm_seq2seq, with masks instead of one-hot padding.
"""

import keras
import numpy as np
from keras import layers

from tests.multiprocess.habits.way import weights_of

BATCH, WORDS, LENGTH = 8, 12, 5


def main(way):
    keras.utils.set_random_seed(1)
    source = keras.Input((LENGTH,), dtype="int32", name="source")
    target = keras.Input((LENGTH,), dtype="int32", name="target")
    _, *state = layers.LSTM(4, return_state=True)(layers.Embedding(WORDS, 3, mask_zero=True)(source))
    embedded = layers.Embedding(WORDS, 3, mask_zero=True)(target)
    decoded = layers.LSTM(4, return_sequences=True)(embedded, initial_state=state)
    model = keras.Model([source, target], layers.Dense(WORDS)(decoded))
    model.compile(
        way.optimizer(keras.optimizers.Adam(1e-2)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    random = np.random.default_rng(0)
    rows = 4 * BATCH
    long = np.arange(LENGTH) < random.integers(1, LENGTH + 1, (rows, 1))
    x, y, z = (random.integers(1, WORDS, (rows, LENGTH)).astype("int32") * long for _ in range(3))
    history = model.fit(
        {"source": way.share(x), "target": way.share(y)},
        way.share(z),
        batch_size=BATCH // way.size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=list(way.callbacks),
    )
    return {"weights": weights_of(model), "logs": history.history}
