"""Names for collectives that users write: equal on all ranks, different within one graph."""

from __future__ import annotations

import collections
import re
import weakref

import tensorflow as tf

_used: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def cleaned(name: str) -> str:
    """`name` with every character that a collective's name cannot have made an underscore."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def numbered(name: str) -> str:
    """`name` where it is new in the graph being built, otherwise followed by how often it was used there.

    Two collectives of one graph may run at the same time and must not share a name. The number depends on
    the position in the program only: a function that is traced again, or on another rank, gets the same
    names. Other functions, loops and branches may use the same names, since TensorFlow runs them before or
    after whatever else marks the same entry of the ledger. Eagerly nothing runs at the same time and the
    name stays as it is.

    Args:
        name: `hvdext.<purpose>.<detail>`.
    """
    if tf.executing_eagerly():
        return name
    counts = _used.setdefault(tf.compat.v1.get_default_graph(), collections.Counter())
    counts[name] += 1
    return name if counts[name] == 1 else f"{name}.{counts[name] - 1}"
