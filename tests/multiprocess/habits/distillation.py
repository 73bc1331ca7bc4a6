"""Knowledge distillation: a `compute_loss` of the model's own, beside a teacher that does not train.

After https://keras.io/examples/vision/knowledge_distillation.
"""

import keras
import numpy as np
from keras import layers, ops

from tests.multiprocess.habits.way import weights_of

BATCH, CLASSES, ALPHA, TEMPERATURE = 8, 3, 0.1, 3.0


class Distiller(keras.Model):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def compile(self, optimizer, metrics, student_loss_fn, distillation_loss_fn):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn = student_loss_fn
        self.distillation_loss_fn = distillation_loss_fn

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False):
        teacher = self.teacher(x, training=False)
        softened = [ops.softmax(logits / TEMPERATURE, axis=1) for logits in (teacher, y_pred)]
        distillation = self.distillation_loss_fn(*softened) * TEMPERATURE**2
        return ALPHA * self.student_loss_fn(y, y_pred) + (1 - ALPHA) * distillation

    def call(self, x):
        return self.student(x)


def network(width):
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(width, activation="relu"), layers.Dense(CLASSES)]
    )


def main(way):
    keras.utils.set_random_seed(1)
    teacher, student = network(16), network(4)
    random = np.random.default_rng(0)
    x = random.normal(size=(5 * BATCH, 6)).astype("float32")
    y = random.integers(0, CLASSES, len(x))
    distiller = Distiller(student, teacher)
    distiller.compile(
        way.optimizer(keras.optimizers.Adam(1e-2)),
        [keras.metrics.SparseCategoricalAccuracy()],
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.losses.KLDivergence(),
    )
    history = distiller.fit(
        way.share(x),
        way.share(y),
        batch_size=BATCH // way.size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=list(way.callbacks),
    )
    return {"weights": weights_of(student, teacher), "logs": history.history}
