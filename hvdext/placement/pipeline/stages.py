"""Cuts a model into chunks by a plan: which layers run in a chunk, which tensors go in and which come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hvdext.keras_tools.functional import Call, Calls, required_function_of
from hvdext.keras_tools.layers import leave_arguments_alone, mask_of, set_mask
from hvdext.keras_tools.models import dtype_of
from hvdext.placement.pipeline.messages import Spec
from hvdext.placement.plan.plan import Plan


@dataclass(frozen=True)
class Parcel:
    """A tensor on its way from one chunk to the next.

    Attributes:
        name: the tensor's, as in `Calls`.
        spec: its shape and dtype.
        is_mask: whether this is Keras' mask of the tensor, not the tensor itself.
        has_gradient: whether a gradient comes back for it: it is a float, real or complex, and weights have
            gone into it.
    """

    name: str
    spec: Spec
    is_mask: bool = False
    has_gradient: bool = False


@dataclass(frozen=True)
class Chunk:
    """One place of a plan.

    What a later chunk takes from an earlier one goes through all chunks in between: messages are between
    neighbours only.

    Attributes:
        number: the place, 0 for the one that the model's inputs enter.
        calls: what runs there, in order.
        takes: what comes from the previous chunk; for chunk 0 the model's inputs.
        gives: what goes to the next chunk; from the last the model's outputs.
    """

    number: int
    calls: tuple[Call, ...]
    takes: tuple[Parcel, ...]
    gives: tuple[Parcel, ...]


def cut(calls: Calls, plan: Plan) -> list[Chunk]:
    """The chunks of a model, one for each place of `plan`, which must be a plan for it.

    Raises:
        ValueError: if a tensor would have to go back to an earlier place, layers at different places have a
            variable in common, or a sparse, ragged or string tensor would have to travel.
    """
    _require_common_places(plan)
    tensors = _symbolic_tensors(calls)
    made = dict.fromkeys(calls.inputs, 0)  # place by tensor name
    needed = dict.fromkeys(calls.outputs, plan.places - 1)  # the last place that takes it
    weighted: set[str] = set()
    for call in calls.calls:
        place = plan.place_of(call.path)
        for name in call.inputs:
            if made[name] > place:
                raise ValueError(
                    "`plan` must let tensors go to later places only. "
                    f"Received: {call.path!r} at place {place} takes {name!r} from place {made[name]}. "
                    "Plan with hvd.plan(..., forward_only=True), or put both layers at one place."
                )
            needed[name] = max(place, needed.get(name, 0))
        made.update(dict.fromkeys(call.outputs, place))
        if getattr(call.operation, "weights", None) or weighted.intersection(call.inputs):
            weighted.update(call.outputs)
    # Where layers take masks, the graph says so: masks are tensors as others. Fastened to the outputs they
    # matter to the loss, and then they have to come along all the way.
    with_masks = any(mask_of(tensors[name]) is not None for name in calls.outputs)
    boundaries = [[_parcel(n, tensors[n], False, travels=False) for n in calls.inputs]]
    for place in range(plan.places - 1):
        names = [name for name in made if made[name] <= place < needed.get(name, -1)]
        boundaries.append(_parcels(names, tensors, weighted, with_masks))
    boundaries.append(_parcels(dict.fromkeys(calls.outputs), tensors, weighted, with_masks))
    return [
        Chunk(
            place,
            tuple(call for call in calls.calls if plan.place_of(call.path) == place),
            tuple(boundaries[place]),
            tuple(boundaries[place + 1]),
        )
        for place in range(plan.places)
    ]


class Stage(keras.layers.Layer):
    """The layers of one chunk as one layer, from a list of tensors to a list of tensors.

    Args:
        chunk: what it runs.
    """

    def __init__(self, chunk: Chunk):
        super().__init__(name=f"stage_{chunk.number}", dtype="float32", autocast=False)
        # Its tensors stay what they are: each layer inside has a precision of its own.
        leave_arguments_alone(self)
        self.supports_masking = True
        self.chunk = chunk
        layers = [call.operation for call in chunk.calls if isinstance(call.operation, keras.layers.Layer)]
        self.held = list({id(layer): layer for layer in layers}.values())
        self.built = True

    def call(self, tensors: Sequence[tf.Tensor], training: bool | None = None) -> list[tf.Tensor]:
        """What the chunk gives, made of what it takes; one tensor per parcel."""
        values: dict[str, Any] = {}
        for parcel, tensor in zip(self.chunk.takes, tensors, strict=True):
            if not parcel.is_mask:
                values[parcel.name] = tf.identity(tensor)  # a mask is fastened to it
        for parcel, tensor in zip(self.chunk.takes, tensors, strict=True):
            if parcel.is_mask:
                set_mask(values[parcel.name], tensor)
        for call in self.chunk.calls:
            call.run(values, training=training)
        return [self._given(values[parcel.name], parcel) for parcel in self.chunk.gives]

    def compute_mask(self, inputs, previous_mask):
        """None: masks travel as parcels of their own."""
        return None

    def _given(self, tensor, parcel):
        given = mask_of(tensor) if parcel.is_mask else tensor
        if given is None:
            raise RuntimeError(
                f"Tensor {parcel.name!r} has a mask in the model's graph and none when it runs."
            )
        if given.dtype != parcel.spec.dtype:  # as whose bytes the next stage would read it
            raise TypeError(
                "`model` must have layers that return the dtype which its graph says: give this one a "
                f"compute_output_spec. Received: tensor {parcel.name!r}, {parcel.spec.dtype.name} in the "
                f"model's graph and {given.dtype.name} when it runs."
            )
        return tf.identity(given)


def _symbolic_tensors(calls: Calls) -> dict[str, Any]:
    function = required_function_of(calls.model)
    tensors = dict(zip(calls.inputs, function.inputs, strict=True))
    for call in calls.calls:
        tensors.update(zip(call.outputs, call.node.outputs, strict=True))
    return tensors


def _parcels(names, tensors, weighted, with_masks) -> list[Parcel]:
    parcels = []
    for name in names:
        tensor = tensors[name]
        parcels.append(_parcel(name, tensor, name in weighted))
        mask = mask_of(tensor)
        if with_masks and mask is not None:
            parcels.append(Parcel(name, _spec(mask), is_mask=True))
    return parcels


def _parcel(name, tensor, is_weighted, travels=True) -> Parcel:
    spec = _spec(tensor)
    kinds = {
        "sparse": getattr(tensor, "sparse", False),
        "ragged": getattr(tensor, "ragged", False),
        "string": travels and spec.dtype == tf.string,
    }
    for kind in (kind for kind, is_it in kinds.items() if is_it):
        raise ValueError(
            f"`model` must not give {kind} tensors from one place to another, or return them. "
            f"Received: {name!r}. Put its maker and takers at one place."
        )
    is_float = spec.dtype.is_floating or spec.dtype.is_complex
    return Parcel(name, spec, has_gradient=is_weighted and is_float)


def _spec(tensor) -> Spec:
    return Spec(tuple(tensor.shape), tf.as_dtype(dtype_of(tensor)))


def _require_common_places(plan: Plan) -> None:
    for group in plan.graph.shared:
        places = {path: plan.place_of(path) for path in group}
        if len(set(places.values())) > 1:
            raise ValueError(
                "`plan` must put layers that have a variable in common at one place. "
                f"Received: {', '.join(f'{path!r} at {place}' for path, place in places.items())}."
            )
