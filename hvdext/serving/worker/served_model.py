"""A model in a worker process: loaded from its file, described, and run on a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from hvdext.inference.deploy.manifest import kind_of
from hvdext.inference.deploy.saved_model import SavedModel
from hvdext.keras_tools.functional import function_of
from hvdext.keras_tools.models import input_structure
from hvdext.serving.service import Signature, TensorSpec
from hvdext.serving.worker.signatures import (
    NUMPY_TYPES,
    Port,
    keras_ports,
    saved_model_ports,
    signature_of,
    to_tensor,
)
from hvdext.serving.worker.stage import load_stage

Function = Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]]


class ServedModel:
    """A model, or a stage of one, that answers batches of any size.

    Args:
        function: what it computes, from a list of tensors to a list of tensors.
        takes: what `run` is given, in the function's order.
        gives: what `run` returns, in the function's order.
        signature: the whole model's, also of a stage.
        platform: "keras" or "tensorflow_savedmodel".

    Attributes:
        signature: as given.
        platform: as given.
        function: as given.
        takes: specs of what `run` is given: of a whole model its inputs, of a stage what crosses the cut
            before it.
        gives: specs of what `run` returns.
    """

    def __init__(
        self,
        function: Function,
        takes: Sequence[Port],
        gives: Sequence[Port],
        signature: Signature,
        platform: str,
    ):
        self.signature = signature
        self.platform = platform
        self.takes: tuple[TensorSpec, ...] = tuple(port.spec for port in takes)
        self.gives: tuple[TensorSpec, ...] = tuple(port.spec for port in gives)
        self.function = function
        self._takes, self._gives = tuple(takes), tuple(gives)

        def answer(*tensors):
            given = function([tf.cast(t, port.inner) for port, t in zip(takes, tensors, strict=True)])
            return [tf.cast(t, port.outer) for port, t in zip(gives, given, strict=True)]

        # One graph for all sizes of batches.
        specs = [tf.TensorSpec(port.spec.shape, port.outer) for port in takes]
        self._answer = tf.function(answer, input_signature=specs, autograph=False)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one batch.

        Args:
            inputs: one array for each of `takes`, by name; those with a batch axis have equally many rows, 1
                or more. BYTES are arrays of `object` that hold `bytes`.

        Returns:
            One array for each of `gives`, by name; those of the model's outputs have as many rows.

        Raises:
            ValueError: if the inputs are not those that it takes.
            RuntimeError: if the model gives other numbers of rows than it has been given.
            tf.errors.OpError: if the model fails on them.
        """
        names = [spec.name for spec in self.takes]
        if set(inputs) != set(names):
            raise ValueError(f"`inputs` must hold {names}. Received: {list(inputs)}.")
        tensors = [to_tensor(port, inputs[port.spec.name]) for port in self._takes]
        outputs = [tensor.numpy() for tensor in self._answer(*tensors)]
        rows = next((len(inputs[p.spec.name]) for p in self._takes if p.has_batch), None)
        for port, output in zip(self._gives, outputs, strict=True):
            if rows is not None and port.has_batch and (output.ndim == 0 or len(output) != rows):
                raise RuntimeError(
                    f"The model must give as many rows as it is given. Received: {rows} rows; output "
                    f"{port.spec.name!r} has the shape {output.shape}."
                )
        return {spec.name: output for spec, output in zip(self.gives, outputs, strict=True)}


def load(path: str | os.PathLike, stage: int | None = None, stages: int = 1) -> ServedModel:
    """Loads a model that is to answer requests, and tries it on batches of one and two rows.

    Nothing in a `.keras` file is run (`safe_mode`). A SavedModel is a program for TensorFlow: serve only
    those whose origin you trust. Tensors of float16 are FP16 to the outside; those of bfloat16, for which
    neither NumPy nor JSON has a word, are FP32, which holds them exactly.

    Args:
        path: a `.keras` file, or the folder of a SavedModel with the signature `serving_default`.
        stage: which stage of a pipeline, 0 to `stages` - 1; None: the whole model.
        stages: into how many stages the model is cut (`hvd.plan(model, places=stages)`); the process then
            never holds more weights than its stage's. Needs a `.keras` file.

    Raises:
        OSError: if there is nothing, or it cannot be read.
        ValueError: if it is no such model, or one that cannot be served: the message says why.
    """
    kind = kind_of(path)
    if kind == "weights":
        raise ValueError(
            "`path` must be a .keras file or a SavedModel's folder. "
            f"Received: the weights {os.fspath(path)!r} without their model."
        )
    if stage is None or stages == 1:
        loaded = _keras_model(path) if kind == "keras" else _saved_model(path)
    elif kind != "keras":
        raise ValueError(
            "A pipeline needs a .keras file: a SavedModel has no layers that could be spread over ranks. "
            f"Received: {os.fspath(path)!r}."
        )
    else:
        part = load_stage(path, stage, stages)
        signature = signature_of(*part.model_ports)
        loaded = ServedModel(part, part.takes, part.gives, signature, "keras")
    _try(loaded)
    return loaded


def _keras_model(path) -> ServedModel:
    model = keras.models.load_model(path, compile=False, safe_mode=True)
    takes, gives = keras_ports(model)
    graph = function_of(model)
    assert graph is not None, "keras_ports refuses such a model"

    def answer(tensors):
        packed = keras.tree.pack_sequence_as(input_structure(graph), list(tensors))
        return keras.tree.flatten(model(packed, training=False))

    return ServedModel(answer, takes, gives, signature_of(takes, gives), "keras")


def _saved_model(path) -> ServedModel:
    model = SavedModel(path)
    takes, gives = saved_model_ports(model.inputs_spec), saved_model_ports(model.outputs_spec)

    def answer(tensors):
        return list(model.answer(dict(zip(model.inputs_spec, tensors, strict=True))).values())

    return ServedModel(answer, takes, gives, signature_of(takes, gives), "tensorflow_savedmodel")


def _try(model: ServedModel) -> None:
    """Builds the graph before the first request, and finds outputs whose first axis is no batch."""
    if any(length is None for spec in model.takes for length in spec.shape[1:]):
        return
    for rows in (1, 2):
        zeros = {spec.name: _zeros(spec, rows) for spec in model.takes}
        try:
            model.run(zeros)
        except tf.errors.OpError:
            return  # zeros are nothing that this model takes, such as an empty text for a picture
        except RuntimeError as error:
            raise ValueError(f"The model cannot be served. {error}") from error


def _zeros(spec: TensorSpec, rows: int) -> np.ndarray:
    shape = tuple(rows if length is None else length for length in spec.shape)
    return np.full(shape, b"" if spec.datatype == "BYTES" else 0, NUMPY_TYPES[spec.datatype])
