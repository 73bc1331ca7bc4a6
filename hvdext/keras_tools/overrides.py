"""What a user's class does in another way than keras.Model: whoever goes around it must say so."""

from __future__ import annotations

import types

import keras

# What neither training nor asking a model nor its files goes through, or what describes it to Keras. Of
# `call` the reading of models speaks.
_HARMLESS = frozenset(
    {
        "build",
        "build_from_config",
        "call",
        "compute_output_shape",
        "compute_output_spec",
        "count_params",
        "from_config",
        "get_build_config",
        "get_config",
        "get_layer",
        "get_quantization_layer_structure",
        "input_spec",
        "quantize",
        "summary",
        "supports_masking",
        "to_json",
    }
)


def overridden(model: keras.Model, *, by_class: bool = True) -> list[str]:
    """The methods and properties of keras.Model that a model has in another way: "Class.method".

    Without what makes and describes a model, such as `__init__` and `get_config`.

    Args:
        model: of any class.
        by_class: whether to name those of its class and of the classes between this and Keras', too, not only
            what was put on the object.
    """
    own = [name for name, value in vars(model).items() if isinstance(value, types.FunctionType)]
    found = {name: f"{model.name}.{name}" for name in own}
    for cls in type(model).__mro__ if by_class else ():
        if cls.__module__.split(".")[0] != "keras":
            for name in vars(cls):
                found.setdefault(name, f"{cls.__name__}.{name}")
    return [words for name, words in found.items() if _matters(name)]


def overrides_problem(model: keras.Model, who: str) -> str | None:
    """What is wrong with a model for what does the work of its methods itself; None if nothing.

    Args:
        model: of any class.
        who: does it: "hvd.pipeline".
    """
    found = overridden(model)
    if not found:
        return None
    return (
        f"`model` must train and be asked as keras.Model does: {who} has steps of its own, and would pass "
        "over what its class does in another way. Give losses, metrics and optimizers of your own to "
        "`compile`, callbacks to `fit`, additional losses to a layer's `add_loss`. "
        f"Received: {type(model).__name__} {model.name!r} with {', '.join(found)}."
    )


def _matters(name: str) -> bool:
    is_open = not name.startswith("_") or name == "__call__"
    return is_open and name not in _HARMLESS and hasattr(keras.Model, name)
