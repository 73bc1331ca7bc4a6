"""A SavedModel as a Keras model: what it takes and gives is its signature's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.inference.deploy.signature_facts import signature_facts

SIGNATURE = "serving_default"


@dataclass(frozen=True)
class Endpoint:
    """One signature of a SavedModel.

    Attributes:
        function: TensorFlow's.
        inputs_spec: the `tf.TensorSpec` of what it takes, by name, in the names' order.
        outputs_spec: of what it gives.
        defaults: what inputs are if they are not given.
    """

    function: Any
    inputs_spec: dict[str, tf.TensorSpec]
    outputs_spec: dict[str, tf.TensorSpec]
    defaults: dict[str, np.ndarray]

    def answer(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """All outputs by name, of all inputs by name; those that have a default may be missing."""
        known = {**self.defaults, **inputs}
        given = self.function(**{name: tf.convert_to_tensor(tensor) for name, tensor in known.items()})
        return {name: given[name] for name in self.outputs_spec}

    def is_like(self, other: Endpoint) -> bool:
        """Whether both take, call and give the same: Keras exports its endpoint `serve` under two names."""
        mine, its = self._calls(), other._calls()
        same = (
            self.inputs_spec == other.inputs_spec
            and self.outputs_spec == other.outputs_spec
            and not (self.defaults or other.defaults)
        )
        return same and bool(mine) and mine == its

    def _calls(self) -> list[str]:
        nodes = self.function.graph.as_graph_def().node
        return [node.attr["f"].func.name for node in nodes if "f" in node.attr]


class SavedModel(keras.Model):
    """The signature `serving_default` of a SavedModel, for `predict` and calls.

    A model with one input takes an array, others a dict by input name. One output is returned as it is,
    several as a dict by name.

    Attributes:
        inputs_spec: the `tf.TensorSpec` of what it takes, by name, in the names' order.
        outputs_spec: of what it gives.
        graph_digest: the SHA-256 of the file that says what it computes and of its assets, such as
            vocabularies.

    Args:
        path: the folder.

    Raises:
        ValueError: if it has no such signature, or that takes ragged or sparse tensors.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(name="saved_model")
        # Keras would track the functions and variables of what it finds in an attribute of its own.
        self._loaded = _Untracked(tf.saved_model.load(os.fspath(path)))
        signatures = self._loaded.value.signatures
        if SIGNATURE not in signatures:
            raise ValueError(
                f"`path` must be a SavedModel with the signature {SIGNATURE!r}. "
                f"Received: one with {sorted(signatures)}. Export it with model.export(path)."
            )
        self._facts = _Untracked(signature_facts(Path(path)))
        default = self.endpoint(SIGNATURE)
        self.function = default.function
        self.graph_digest = _graph_digest(Path(path))
        self.inputs_spec = default.inputs_spec
        self.outputs_spec = default.outputs_spec
        self.built = True

    def endpoint(self, name: str) -> Endpoint:
        """The signature of that name, which must be there.

        Raises:
            ValueError: if it takes ragged or sparse tensors.
        """
        facts = self._facts.value[name]
        for kind in facts.taken_apart:
            raise ValueError(
                f"The signature {name!r} must take dense tensors: of others TensorFlow offers their parts, "
                "whose rows are no batch; convert them in the model, as with tf.RaggedTensor.from_tensor. "
                f"Received: one that takes a {kind}."
            )
        function = self._loaded.value.signatures[name]
        # TensorFlow gives them in an order that differs from process to process.
        inputs = dict(sorted(function.structured_input_signature[1].items()))
        outputs = dict(sorted(function.structured_outputs.items()))
        return Endpoint(function, inputs, outputs, facts.defaults)

    def other_endpoints(self) -> list[str]:
        """The names of its other signatures."""
        return sorted(set(self._loaded.value.signatures) - {SIGNATURE})

    def call(self, inputs):
        """The outputs; see the class."""
        return self.without_dict_of_one(self.answer(self._by_name(inputs)))

    def answer(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """All outputs by name, of all inputs by name; those that have a default may be missing."""
        return self.endpoint(SIGNATURE).answer(inputs)

    @staticmethod
    def without_dict_of_one(outputs):
        """An output that is alone, without its name."""
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def _by_name(self, inputs):
        names = list(self.inputs_spec)
        needed = [name for name in names if name not in self.endpoint(SIGNATURE).defaults]
        if not isinstance(inputs, Mapping):
            flat = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            inputs = dict(zip(needed, flat, strict=False)) if len(needed) == len(flat) == 1 else inputs
        if not isinstance(inputs, Mapping) or not set(needed) <= set(inputs) <= set(names):
            received = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"`x` must be a dict with the inputs {sorted(names)}. Received: {received}.")
        return {
            name: tf.cast(inputs[name], spec.dtype) if spec.dtype != tf.string else inputs[name]
            for name, spec in self.inputs_spec.items()
            if name in inputs
        }


class _Untracked:
    """Hides a value from Keras."""

    def __init__(self, value):
        self.value = value


def _graph_digest(folder):
    found = hashlib.sha256()
    assets = [path for path in folder.glob("assets/**/*") if path.is_file()]
    for path in [*folder.glob("saved_model.pb*"), *sorted(assets)]:
        found.update(f"{path.relative_to(folder)} {path.stat().st_size};".encode())
        found.update(path.read_bytes())
    return found.hexdigest()
