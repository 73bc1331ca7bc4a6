"""Do all ranks hold the same bits? A fingerprint of each rank's variables, compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import tensorflow as tf

from hvdext.comm.communicator import Communicator


def digest(variables: Sequence) -> str:
    """The SHA-256 of the variables' bytes, dtypes and shapes, in their order, as 64 hexadecimal digits.

    Args:
        variables: Keras or TensorFlow variables, or arrays.
    """
    found = hashlib.sha256()
    for variable in variables:
        value = tf.convert_to_tensor(variable).numpy()
        found.update(f"{value.dtype.name} {value.shape};".encode())
        found.update(value.tobytes())
    return found.hexdigest()


def check_equal(comm: Communicator, variables: Sequence, name: str) -> str:
    """Returns the ranks' common digest; every rank must call it.

    Args:
        comm: who compares.
        variables: Keras or TensorFlow variables.
        name: the collective's name, the same on every rank.

    Raises:
        RuntimeError: on every rank alike, if the ranks hold different bits.
    """
    digests = comm.allgather_object(digest(variables), name)
    if len(set(digests)) > 1:
        found = "; ".join(f"rank {r}: {d[:12]}" for r, d in zip(comm.ranks, digests, strict=True))
        raise RuntimeError(f"The ranks hold different weights where they must be equal ({found}).")
    return digests[0]
