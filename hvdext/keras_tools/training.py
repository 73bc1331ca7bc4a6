"""What a model is compiled with, and the data of `fit` and `evaluate` before Keras has begun."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras.src import backend
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.trainers.data_adapters import data_adapter_utils, get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from tensorflow.python.eager import context

BATCH_SIZE = 32  # of arrays, unless the user says otherwise
_EMPTY = "`x` must hold at least one batch. Received: none."

# -- what a model is compiled with ---------------------------------------------------------------------------


def require_compiled(model: keras.Model, method: str) -> None:
    """Refuses to go on with a model that is not compiled, in Keras' words.

    Args:
        model: the model.
        method: what the user has called.

    Raises:
        ValueError: if it is not compiled.
    """
    model._assert_compile_called(method)


def compiled_with(model: keras.Model) -> dict[str, Any]:
    """The arguments that a compiled model's `compile` was given, by name: what Keras saves of it."""
    return model._compile_config.config


def compiled_loss(model: keras.Model) -> Any:
    """What makes one loss of those that the model was compiled with: called with y, y_pred, sample_weight."""
    return model._compile_loss


def loss_is_keras_s(model: keras.Model) -> bool:
    """Whether a model trains on what it was compiled with, without a step or loss of its own."""
    methods = ("train_step", "compute_loss")
    return all(getattr(type(model), name) is getattr(keras.Model, name) for name in methods)


def number_of_losses(model: keras.Model) -> int | None:
    """How many losses a compiled model has; None before they are built."""
    losses = model._compile_loss
    return len(losses._flat_losses) if losses is not None and losses.built else None


def reductions_of(model: keras.Model) -> set[str]:
    """The reductions of the losses of all outputs, once they are built."""
    losses = [entry.loss for entry in compiled_loss(model)._flat_losses]
    return {getattr(loss, "reduction", "sum_over_batch_size") for loss in losses}


def additional_loss(model: keras.Model, loss: Any) -> Any:
    """What a layer's loss, such as a penalty, adds to the model's."""
    return model._aggregate_additional_loss(loss)


def build_symbolically(function: Any, *args: Any, **kwargs: Any) -> None:
    """Calls what builds itself when it is first called, such as losses and metrics, on no values.

    Args:
        function: what is called.
        *args: with symbolic tensors in them.
        **kwargs: the same.
    """
    backend.compute_output_spec(function, *args, **kwargs)


# -- data ----------------------------------------------------------------------------------------------------


def is_arrays(x: Any) -> bool:
    """Whether `x` is an array, or a nested structure of arrays, that Keras batches and shuffles itself."""
    return bool(keras.tree.flatten(x)) and can_convert_arrays(x)


def global_seed() -> int | None:
    """TensorFlow's global seed; None if none has been set."""
    return context.global_seed()


def split(arrays: Sequence[Any], validation_split: float) -> tuple[tuple, tuple]:
    """The arrays to train on and those to validate with, as `fit` makes them.

    Args:
        arrays: x, y and sample_weight.
        validation_split: of `fit`.

    Raises:
        ValueError: as `fit` does, of what cannot be split.
    """
    return train_validation_split(tuple(arrays), validation_split=validation_split)


def weights_of(y: Any, sample_weight: Any, class_weight: Any) -> Any:
    """The sample weights that `train_on_batch` makes of its arguments.

    Args:
        y: targets.
        sample_weight: None where there are class weights.
        class_weight: None where there are none.
    """
    if class_weight is None or sample_weight is not None:
        return sample_weight
    return data_adapter_utils.class_weight_to_sample_weights(y, class_weight)


def number_of_batches(x: Any, batch_size: int | None, steps: int | None) -> int | None:
    """How many batches an epoch has, None if nobody knows; what is asked is not asked for a batch.

    Args:
        x: as for `fit`.
        batch_size: of arrays; None: Keras' default.
        steps: per epoch, or None.
    """
    if steps is not None:
        return steps
    if isinstance(x, types.GeneratorType):
        return None
    if is_arrays(x):
        return math.ceil(keras.tree.flatten(x)[0].shape[0] / (batch_size or BATCH_SIZE))
    return get_data_adapter(x).num_batches


def first_batch(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, **options: Any) -> Any:
    """The first batch that `fit` or `evaluate` would make of its arguments without shuffling them.

    Args:
        model: the model.
        x: as for `fit`; of a generator the batch is gone then, see `peeked`.
        y: as for `fit`.
        sample_weight: as for `fit`.
        **options: `batch_size`, `steps_per_epoch` and `class_weight` of `fit`.

    Raises:
        ValueError: if there is none.
    """
    epoch = TFEpochIterator(
        x=x, y=y, sample_weight=sample_weight, distribute_strategy=model.distribute_strategy, **options
    )
    try:
        for _, _, batches in epoch:
            return next(batches)
    except StopIteration:
        pass
    finally:
        epoch.reset()  # ends the workers of a `PyDataset`
    raise ValueError(_EMPTY)


def peeked(x: Iterator[Any]) -> tuple[Any, Iterator[Any]]:
    """The first batch of a generator, and a generator that begins with it.

    Raises:
        ValueError: if there is none.
    """
    for first in x:
        return first, (batch for batch in itertools.chain([first], x))
    raise ValueError(_EMPTY)
