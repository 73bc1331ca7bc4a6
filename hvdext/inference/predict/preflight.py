"""What comes before the first batch: is the model whole and the same on all ranks, and the data?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.common.wording import describe
from hvdext.inference.predict.identity import architecture_digest, weights_digest
from hvdext.inference.predict.own_methods import require_outside
from hvdext.inference.predict.sources.source import Source
from hvdext.keras_tools.models import flat_layers, is_built


def prepare(
    comm: Communicator,
    subject: str,
    model: Any,
    make: Callable[[], Source],
    settings: Mapping[str, object],
    check: Callable[[], None],
    build: Callable[[Source], Any] | None = None,
) -> tuple[Source, dict[str, object]]:
    """Makes the source and compares everything over the ranks; every rank must call it.

    Args:
        comm: who compares.
        subject: the function, for the message.
        model: the user's.
        make: makes the source.
        settings: what else must agree.
        check: raises if an argument breaks its rule.
        build: makes the weights of a model that has none; None: by a trace of what Keras predicts with.

    Returns:
        The source, and what the predictions depend on.

    Raises:
        ValueError: on every rank alike, if an argument breaks its rule, or ranks differ.
        RuntimeError: if another rank has ended, or gone on, without calling it.
    """
    require_outside(subject)
    facts: dict[str, object] = {}
    problem: str | None = None
    cause: Exception | None = None
    source: Source | None = None
    try:
        check()
        check_model(model, subject)
        source = make()
        if not is_built(model) and (spec := source.spec()) is not None:
            trace(model, spec) if build is None else build(source)
        facts = source.facts() | {
            "weights (SHA-256)": weights_digest(model),
            "architecture (SHA-256)": architecture_digest(model),
        }
    except Exception as error:  # reading the first batch runs the user's code
        cause = error
        problem = describe(error)
    try:
        agreement.check(comm, subject, {**settings, **facts}, problem)
    except ValueError as error:
        raise error from cause
    except Exception as lost:
        raise RuntimeError(
            f"{subject} must be called by every rank, with the same model, data and arguments. Received: a "
            f"call on rank {comm.ranks[comm.rank]}, but another rank has ended without it. "
            f"This rank was told: {lost}"
        ) from lost
    assert source is not None
    return source, facts


def check_model(model: Any, subject: str) -> None:
    """Raises unless `model` is a Keras model of which every rank holds the whole."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: a {type(model).__name__}.")
    from hvdext.placement.pipeline.model import PipelineModel
    from hvdext.placement.slices.layer import SlicedLayer

    method = subject.removeprefix("hvd.")
    if isinstance(model, PipelineModel):
        kind = "a pipeline"
    elif any(isinstance(layer, SlicedLayer) for layer in flat_layers(model)):
        kind = "a model with sliced layers"
    else:
        return
    raise ValueError(
        f"`model` must be whole on every rank. Received: {kind}, on which all ranks call "
        f"`model.{method}` together."
    )


def trace(model: keras.Model, spec: Any) -> Any:
    """The symbolic outputs of `model` for a batch of that type; makes its weights, if it has none."""
    model.make_predict_function()
    function = tf.function(lambda data: model.predict_function([data]), autograph=False)
    return function.get_concrete_function(spec).structured_outputs
