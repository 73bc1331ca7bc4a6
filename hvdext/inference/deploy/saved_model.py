"""A SavedModel as a Keras model: what it takes and gives is its signature's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import keras
import tensorflow as tf

SIGNATURE = "serving_default"


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
        ValueError: if it has no such signature.
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
        self.function = signatures[SIGNATURE]
        self.graph_digest = _graph_digest(Path(path))
        # TensorFlow gives them in an order that differs from process to process.
        self.inputs_spec = dict(sorted(self.function.structured_input_signature[1].items()))
        self.outputs_spec = dict(sorted(self.function.structured_outputs.items()))
        self.built = True

    def call(self, inputs):
        """The outputs; see the class."""
        return self.without_dict_of_one(self.answer(self._by_name(inputs)))

    def answer(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """All outputs by name, of all inputs by name."""
        given = self.function(**{name: tf.convert_to_tensor(tensor) for name, tensor in inputs.items()})
        return {name: given[name] for name in self.outputs_spec}

    @staticmethod
    def without_dict_of_one(outputs):
        """An output that is alone, without its name."""
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def _by_name(self, inputs):
        names = list(self.inputs_spec)
        if not isinstance(inputs, Mapping):
            flat = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            inputs = dict(zip(names, flat, strict=False)) if len(names) == len(flat) == 1 else inputs
        if not isinstance(inputs, Mapping) or set(inputs) != set(names):
            received = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"`x` must be a dict with the inputs {sorted(names)}. Received: {received}.")
        return {
            name: tf.cast(inputs[name], spec.dtype) if spec.dtype != tf.string else inputs[name]
            for name, spec in self.inputs_spec.items()
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
