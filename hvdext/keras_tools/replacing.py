"""Sets what Keras keeps under a private name."""

from __future__ import annotations

from typing import Any


def replace(owner: Any, **values: Any) -> None:
    """Sets attributes that must be there: a name that Keras has given up would be read by nobody.

    Args:
        owner: an object of Keras'.
        **values: by the attributes' names.

    Raises:
        AttributeError: if it has no such attribute.
    """
    for name, value in values.items():
        if not hasattr(owner, name):
            raise AttributeError(f"Keras' {type(owner).__name__} has no {name!r} any more.")
        setattr(owner, name, value)
