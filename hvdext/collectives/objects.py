"""Python objects from rank to rank: settings, vocabularies, results."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvdext.collectives.arguments import place_of_root, user_name
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords


@suggests_keywords
def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    session: None = None,
    name: str | None = None,
    process_set: ProcessSet | None = None,
) -> Any:
    """Returns rank `root_rank`'s object on every rank. Every rank must call it, outside of `tf.function`.

    Args:
        obj: anything that cloudpickle can pickle, lambdas and classes of the script included; what other
            ranks than the root pass is ignored.
        root_rank: the global rank whose object counts.
        session: must be None.
        name: the collective's name; the same on every rank.
        process_set: among which ranks; None: all.

    Returns:
        On every rank a copy; alone the object itself.

    Raises:
        ValueError: if an argument breaks its rule; on every rank alike, if the object does not pickle.
        RuntimeError: within a `tf.function`.
    """
    comm = _comm("broadcast_object", session, process_set)
    return comm.broadcast_object(obj, place_of_root(comm, root_rank), user_name("broadcast_object", name))


@suggests_keywords
def allgather_object(
    obj: Any, session: None = None, name: str | None = None, process_set: ProcessSet | None = None
) -> list:
    """Returns all ranks' objects, in rank order. Every rank must call it, outside of `tf.function`.

    Args:
        obj: anything that cloudpickle can pickle, lambdas and classes of the script included.
        session: must be None.
        name: the collective's name; the same on every rank.
        process_set: among which ranks; None: all.

    Returns:
        Copies, one for each rank; alone the object itself in a list.

    Raises:
        ValueError: if an argument breaks its rule; on every rank alike, if a rank's object does not pickle.
        RuntimeError: within a `tf.function`.
    """
    comm = _comm("allgather_object", session, process_set)
    return comm.allgather_object(obj, user_name("allgather_object", name))


def _comm(function, session, process_set) -> Communicator:
    if session is not None:
        raise ValueError(
            "`session` must be None: TensorFlow 2 runs without sessions, drop the argument. "
            f"Received: session={session!r}."
        )
    if not tf.executing_eagerly():
        raise RuntimeError(f"hvd.{function} must be called outside of tf.function: objects are no tensors.")
    comm = current()
    return comm if process_set is None else comm.subset(process_set.ranks)
