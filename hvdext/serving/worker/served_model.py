"""A model in a worker process: loaded from its file, described, and run on a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.common.log import logger
from hvdext.inference.deploy.manifest import kind_of
from hvdext.inference.deploy.saved_model import SIGNATURE, Endpoint, SavedModel
from hvdext.keras_tools.deferred import has_value
from hvdext.keras_tools.functional import function_of, with_open_batch
from hvdext.keras_tools.models import input_structure
from hvdext.serving.service import DEFAULT_SIGNATURE, Signature, TensorSpec
from hvdext.serving.worker.model_state import ModelState
from hvdext.serving.worker.row_dependence import WrongRows, why_alone
from hvdext.serving.worker.signatures import (
    Port,
    as_traced,
    keras_ports,
    saved_model_ports,
    signature_of,
    to_tensor,
)
from hvdext.serving.worker.stage import load_stage

Function = Callable[[Sequence[tf.Tensor | None]], Sequence[tf.Tensor]]
_log = logger("serve")


class ServedModel:
    """A model, or a stage of one, that answers batches of any size.

    Args:
        function: what it computes, from a list of tensors to a list of tensors; None stands for an optional
            input that is not there.
        takes: what `run` is given, in the function's order.
        gives: what `run` returns, in the function's order.
        platform: "keras" or "tensorflow_savedmodel".
        variables: those that it may change when it computes.
        whole: inputs and outputs of the whole model, of a stage.

    Attributes:
        signature: the whole model's, also of a stage.
        others: the same model by its other signatures.
        platform: as given.
        function: as given.
        takes: specs of what `run` is given: of a whole model its inputs, of a stage what crosses the cut
            before it.
        gives: specs of what `run` returns.

    Raises:
        ValueError: if it cannot be served.
    """

    def __init__(
        self,
        function: Function,
        takes: Sequence[Port],
        gives: Sequence[Port],
        platform: str,
        variables: Iterable[Any] = (),
        whole: tuple[Sequence[Port], Sequence[Port]] | None = None,
    ):
        self.platform = platform
        self.function = function
        self.others: dict[str, ServedModel] = {}
        self.takes: tuple[TensorSpec, ...] = tuple(one.spec for one in takes)
        self._takes, self._gives = tuple(takes), tuple(gives)
        self._variables = tuple(variables)
        self._answers: dict[frozenset[str], Any] = {}
        inputs, outputs = whole or (takes, gives)
        self.signature = signature_of(inputs, outputs)  # refuses, before it takes long
        made = self._answer_to(frozenset(spec.name for spec in self.takes)).get_concrete_function()
        self._gives = tuple(as_traced(gives, made.structured_outputs))
        self.gives: tuple[TensorSpec, ...] = tuple(one.spec for one in self._gives)
        if [one.spec for one in outputs] == [one.spec for one in gives]:
            self.signature = signature_of(inputs, self._gives)

    def _answer_to(self, names: frozenset[str]) -> Any:
        """The graph for the inputs of these names, the same for all sizes of batches."""
        if names not in self._answers:
            present = [one for one in self._takes if one.spec.name in names]

            def answer(*tensors):
                given = {
                    one.spec.name: tf.cast(t, one.inner) for one, t in zip(present, tensors, strict=True)
                }
                outputs = self.function([given.get(one.spec.name) for one in self._takes])
                return [_outward(tensor) for tensor in outputs]

            specs = [tf.TensorSpec(one.spec.shape, one.outer) for one in present]
            self._answers[names] = tf.function(answer, input_signature=specs, autograph=False)
        return self._answers[names]

    @property
    def signatures(self) -> dict[str, Signature]:
        """All signatures by name, the default first."""
        return {DEFAULT_SIGNATURE: self.signature} | {k: one.signature for k, one in self.others.items()}

    def of(self, signature: str) -> ServedModel:
        """The model by one of its signatures."""
        return self if signature == DEFAULT_SIGNATURE else self.others[signature]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one batch.

        Args:
            inputs: one array for each of `takes`, by name; those with a batch axis have equally many rows, 1
                or more. BYTES are arrays of `object` that hold `bytes`. Optional ones may be missing.

        Returns:
            One array for each of `gives`, by name; those of the model's outputs have as many rows.

        Raises:
            ValueError: if the inputs are not those that it takes.
            WrongRows: if the model gives other numbers of rows than it has been given.
            tf.errors.OpError: if the model fails on them.
        """
        names = [spec.name for spec in self.takes]
        needed = {spec.name for spec in self.takes if not spec.optional}
        if not inputs or not needed <= set(inputs) <= set(names):
            raise ValueError(f"`inputs` must hold {names}. Received: {list(inputs)}.")
        present = [one for one in self._takes if one.spec.name in inputs]
        tensors = [to_tensor(one, inputs[one.spec.name]) for one in present]
        outputs = [tensor.numpy() for tensor in self._answer_to(frozenset(inputs))(*tensors)]
        rows = next((len(inputs[one.spec.name]) for one in present if one.has_batch), None)
        for one, output in zip(self._gives, outputs, strict=True):
            if rows is not None and one.has_batch and (output.ndim == 0 or len(output) != rows):
                raise WrongRows(
                    f"The model must give as many rows as it is given. Received: {rows} rows; output "
                    f"{one.spec.name!r} has the shape {output.shape}."
                )
        return {spec.name: output for spec, output in zip(self.gives, outputs, strict=True)}

    def examine(self) -> None:
        """Tries the model on random rows: may those of several requests be computed together?

        What has been found is in the signature's `alone`.

        Raises:
            ValueError: if it cannot be served.
        """
        needed = [one for one in self._takes if not one.spec.optional]
        among = [self._takes] if len(needed) in (0, len(self._takes)) else [self._takes, needed]
        try:
            reasons = [why_alone(self.run, ports, ModelState(self._variables)) for ports in among]
        except WrongRows as error:
            raise ValueError(f"The model cannot be served. {error}") from error
        self.signature = replace(self.signature, alone=next(filter(None, reasons), ""))


def _outward(tensor):
    """Of a type that the outside has a word for."""
    return tf.cast(tensor, tf.float32) if getattr(tensor, "dtype", None) == tf.bfloat16 else tensor


def load(path: str | os.PathLike, stage: int | None = None, stages: int = 1) -> ServedModel:
    """Loads a model that is to answer requests, and tries it on batches of random rows.

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
        variables = [variable for variable in part.layers.variables if has_value(variable)]
        loaded = ServedModel(part, part.takes, part.gives, "keras", variables, part.model_ports)
    for one in {id(one): one for one in (loaded, *loaded.others.values())}.values():
        one.examine()
    return loaded


def _keras_model(path) -> ServedModel:
    model = with_open_batch(keras.models.load_model(path, compile=False, safe_mode=True))
    takes, gives = keras_ports(model)
    graph = function_of(model)
    assert graph is not None, "keras_ports refuses such a model"

    def answer(tensors):
        packed = keras.tree.pack_sequence_as(input_structure(graph), list(tensors))
        return keras.tree.flatten(model(packed, training=False))

    return ServedModel(answer, takes, gives, "keras", model.variables)


def _saved_model(path) -> ServedModel:
    model = SavedModel(path)
    served = _endpoint(model, model.endpoint(SIGNATURE))
    default = model.endpoint(SIGNATURE)
    for name in model.other_endpoints():
        try:
            endpoint = model.endpoint(name)
            served.others[name] = served if endpoint.is_like(default) else _endpoint(model, endpoint)
        except ValueError as error:
            _log.warning("%s: the signature %r cannot be served: %s", os.fspath(path), name, error)
    return served


def _endpoint(model: SavedModel, endpoint: Endpoint) -> ServedModel:
    # An input that is the same for all rows, such as a temperature, is what its default says.
    offered = {
        name: spec
        for name, spec in endpoint.inputs_spec.items()
        if name not in endpoint.defaults or (spec.shape.rank and spec.shape[0] is None)
    }
    takes, gives = saved_model_ports(offered), saved_model_ports(endpoint.outputs_spec)
    takes = [
        replace(one, spec=replace(one.spec, optional=True)) if one.spec.name in endpoint.defaults else one
        for one in takes
    ]

    def answer(tensors, model=model):  # which keeps the variables
        given = zip(offered, tensors, strict=True)
        outputs = endpoint.answer({name: tensor for name, tensor in given if tensor is not None})
        return list(outputs.values())

    return ServedModel(answer, takes, gives, "tensorflow_savedmodel", endpoint.function.variables)
