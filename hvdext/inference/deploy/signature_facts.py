"""What a SavedModel's file says of its signatures, and TensorFlow does not once it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2, struct_pb2


@dataclass(frozen=True)
class SignatureFacts:
    """Of one signature.

    Attributes:
        defaults: what inputs are if they are not given, by name.
        taken_apart: the kinds of inputs that are offered as several tensors, their parts: "RaggedTensor",
            "SparseTensor". The parts' first axes are no batch.
    """

    defaults: dict[str, np.ndarray]
    taken_apart: tuple[str, ...]


def signature_facts(folder: Path) -> dict[str, SignatureFacts]:
    """The facts of each signature in a SavedModel's folder, by its name.

    Raises:
        OSError: if the file cannot be read.
    """
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    return {
        name: SignatureFacts(
            {key: tf.make_ndarray(value) for key, value in signature.defaults.items()},
            tuple(sorted(set(_taken_apart(graph, signature)))),
        )
        for graph in saved.meta_graphs
        for name, signature in graph.signature_def.items()
    }


def _taken_apart(graph, signature) -> Iterator[str]:
    """Kinds of tensors among the arguments of the functions that a signature calls."""
    places = {info.name.partition(":")[0] for info in signature.inputs.values()}
    library = {function.signature.name: function.node_def for function in graph.graph_def.library.function}
    functions = graph.object_graph_def.concrete_functions
    for node in graph.graph_def.node:
        if "f" not in node.attr or not places.intersection(name.partition(":")[0] for name in node.input):
            continue
        # A wrapper that TensorFlow has put around the user's function.
        for inner in library.get(node.attr["f"].func.name, ()):
            if "f" in inner.attr and inner.attr["f"].func.name in functions:
                yield from _kinds(functions[inner.attr["f"].func.name].canonicalized_input_signature)


def _kinds(value) -> Iterator[str]:
    kind = value.WhichOneof("kind")
    if kind == "type_spec_value":
        name = struct_pb2.TypeSpecProto.TypeSpecClass.Name(value.type_spec_value.type_spec_class)
        yield name.removesuffix("SPEC").title().replace("_", "")
    elif kind in ("tuple_value", "list_value"):
        for part in getattr(value, kind).values:
            yield from _kinds(part)
    elif kind == "dict_value":
        for part in value.dict_value.fields.values():
            yield from _kinds(part)
    elif kind == "named_tuple_value":
        for part in value.named_tuple_value.values:
            yield from _kinds(part.value)
