"""Of which metrics the states may be added up."""

import keras
import pytest
from keras import metrics, ops

from hvdext.keras_tools.additive import states_add_up


class Inherits(metrics.MeanIoU):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, ops.argmax(y_pred, -1), sample_weight)


class WithAnotherResult(metrics.Mean):
    def result(self):
        return ops.sqrt(super().result())


class InHelpers(metrics.MeanIoU):
    """Nobody can tell, but what `result` reads is Keras' own."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.add(y_true)

    def add(self, matrix):
        self.total_cm.assign_add(matrix)


class OfBase(InHelpers):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return metrics.MeanIoU.update_state(self, y_true, y_pred)


class OfInner(metrics.Metric):
    def __init__(self):
        super().__init__()
        self.precision, self.recall = metrics.Precision(), metrics.Recall()

    def update_state(self, y_true, y_pred, sample_weight=None):
        for inner in range(2):
            del inner
        self.precision.update_state(y_true, y_pred)
        self.recall.update_state(y_true, y_pred)

    def result(self):
        return self.precision.result() * self.recall.result()


class Own(metrics.Metric):
    def __init__(self):
        super().__init__()
        self.one, self.two = (self.add_weight(name=n, initializer="zeros") for n in ("one", "two"))
        self.pieces = [self.add_weight(name=f"piece{i}", initializer="zeros") for i in range(2)]
        self.threshold, self.function, self.seen = 0.5, ops.square, []

    def update_state(self, y_true, y_pred, sample_weight=None):
        found = ops.cast(y_pred > self.threshold, self.dtype)
        self.one.assign_add(ops.sum(self.function(found)))
        self.two.assign(ops.add(1.0, self.two) - ops.sum(y_true))
        for i in range(2):
            self.pieces[i].assign_add(y_pred[i])

    def result(self):
        return self.one / self.two


class Moving(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.one.assign_add(0.1 * (ops.mean(y_pred) - self.one))


class Turned(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.one.assign(ops.mean(y_pred) - self.one)


class Extreme(metrics.Mean):
    def update_state(self, values, sample_weight=None):
        self.total.assign(ops.maximum(self.total, ops.max(values)))
        self.count.assign(1.0)


class OfAnExtreme(Extreme):
    def update_state(self, values, sample_weight=None):
        super().update_state(ops.abs(values))


class InPython(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.append(y_pred)


class Given(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        keras.tree.map_structure(lambda v: v.assign(1.0), self.variables)


class FromOne(Own):
    def reset_state(self):
        for variable in self.variables:
            variable.assign(1.0)


ADD_UP = (Inherits, WithAnotherResult, InHelpers, OfBase, OfInner, Own, metrics.AUC, metrics.R2Score)
DO_NOT = (Moving, Turned, Extreme, OfAnExtreme, InPython, Given, FromOne)


@pytest.mark.parametrize("kind", ADD_UP + DO_NOT, ids=lambda kind: kind.__name__)
def test_states_add_up(kind):
    metric = kind(3) if issubclass(kind, metrics.MeanIoU) else kind()
    assert states_add_up(metric) == (kind in ADD_UP)


def test_without_source():
    names = {}
    exec("def update_state(self, y_true, y_pred, sample_weight=None):\n    self.one.assign_add(1.0)", names)
    assert not states_add_up(type("Unseen", (Own,), names)())
