"""Segmentation: a metric that takes the largest class first, as a subclass of Keras' own.

After https://keras.io/examples/vision/segformer and its like.
"""

import keras
import numpy as np
from keras import layers

from tests.multiprocess.habits.way import weights_of

BATCH, CLASSES = 8, 3


class IoUOfTheLargest(keras.metrics.MeanIoU):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, keras.ops.argmax(y_pred, axis=-1), sample_weight)


def main(way):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(CLASSES, 3, padding="same")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    iou = IoUOfTheLargest(CLASSES, name="iou")
    model.compile(way.optimizer(keras.optimizers.SGD(0.1)), loss, metrics=[iou])
    random = np.random.default_rng(0)
    x = random.normal(size=(4 * BATCH, 4, 4, 2)).astype("float32")
    y = np.sort(random.integers(0, CLASSES, (4 * BATCH, 4, 4)), axis=0)
    history = model.fit(
        way.share(x),
        way.share(y),
        batch_size=BATCH // way.size,
        validation_data=(way.share(x[:13]), way.share(y[:13])),
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=list(way.callbacks),
    )
    evaluated = way.evaluate(model, x[:13], y[:13], batch_size=4)
    return {"weights": weights_of(model), "logs": history.history | {"evaluated": list(evaluated.values())}}
