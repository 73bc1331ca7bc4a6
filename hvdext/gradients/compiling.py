"""Which training steps are compiled in parts: those XLA would compile whole if ranks did not exchange."""

from __future__ import annotations

from typing import Any

import keras

from hvdext.comm.current import current
from hvdext.gradients.compiled_parts import in_compiled_parts
from hvdext.gradients.training import hooks_in
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.train_step import Step


def is_in_parts(model: keras.Model) -> bool:
    """Whether XLA is asked to compile a model's training step, and gradients are exchanged in it.

    One process alone exchanges nothing: Keras has all of it compiled.
    """
    return bool(hooks_in(model)) and bool(model.jit_compile) and current().size > 1


def compiled_in_parts(model: keras.Model, step: Step) -> Step:
    """`step` of a model as it is, or its parts that compute compiled by XLA."""
    is_split = is_in_parts(model)
    for hook in hooks_in(model):
        hook.compile_updates(is_split)
    chosen = in_compiled_parts(step, current(), model.name) if is_split else step

    @without_autograph
    def train_step(data: Any) -> Any:
        return chosen(data)

    return train_step
