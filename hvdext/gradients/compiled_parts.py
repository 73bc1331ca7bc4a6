"""A training step of which XLA compiles what computes; what ranks exchange stands in between.

    compiled: forward, loss, metrics, gradients -> exchanged -> compiled: Keras' own apply

The step is traced as one compiled function in which `apply` only notes what it is given, and is called after
it. That is the same step where nothing after `apply` looks at what it changes. Where something does, or what
computes has to exchange (losses under a mask, layers that normalize over all ranks), nothing but `apply`
is compiled, and the first rank says why. All gradients leave the compiled function together: with several
buckets the exchange of the first begins when backward has ended.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.once import warn_once
from hvdext.gradients.sums import marked
from hvdext.gradients.train_step import current_step
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.train_step import Step
from hvdext.keras_tools.xla import compiled, refused, uses, with_lasting_variables


class _CannotSplit(RuntimeError):
    """Why a step is not compiled."""


@dataclass
class Update:
    """A call of an optimizer's `apply` that has been put off.

    Attributes:
        hook: in front of the optimizer.
        outer: the optimizer that was called.
        gradients: one or None per variable.
        variables: what it changes.
    """

    hook: Any
    outer: keras.optimizers.Optimizer
    gradients: list
    variables: list[keras.Variable]

    @property
    def changes(self) -> list:
        """All variables that may hold something else after it."""
        return [*self.variables, *self.outer.variables]


class _Part:
    """What is traced as one compiled function."""

    def __init__(self) -> None:
        self.graph = tf.compat.v1.get_default_graph()
        self.updates: list[Update] = []
        self._first = 0  # how many operations there were before the first update

    def put_off(self, update: Update) -> None:
        """Notes an update, to be made after the function."""
        if tf.compat.v1.get_default_graph() is not self.graph:
            raise _CannotSplit(f"{update.outer.name!r} is applied under a condition or in a loop")
        if not self.updates:
            self._first = len(self.graph.get_operations())
        update.gradients = marked(update.gradients, update.variables)  # whose origin is not seen from outside
        self.updates.append(update)

    def check(self) -> None:
        """Raises if what follows the first update would see that it has been put off."""
        following = self.graph.get_operations()[self._first :] if self.updates else []
        for update in self.updates:
            if uses(following, self.graph, update.changes):
                raise _CannotSplit(f"the step goes on with what {update.outer.name!r} has changed")


_now: Any = threading.local()


def put_off(update: Update) -> bool:
    """Whether `update` is made later, since XLA compiles what this thread is tracing."""
    part = getattr(_now, "part", None)
    if part is None:
        return False
    part.put_off(update)
    return True


@contextlib.contextmanager
def _tracing() -> Iterator[_Part]:
    _now.part = _Part()
    try:
        yield _now.part
        _now.part.check()
    finally:
        _now.part = None


def in_compiled_parts(step: Step, comm: Communicator, name: str) -> Step:
    """`step` of a model whose optimizers exchange gradients, as far as XLA can compile it.

    Args:
        step: the model's.
        comm: who exchanges.
        name: the model's.
    """

    @without_autograph
    def apart(data: Any) -> Any:
        updates: list[Update] = []

        def computed(data):
            with with_lasting_variables(), _tracing() as part:
                logs = step(data)
            updates[:] = part.updates
            return logs, [update.gradients for update in part.updates]

        try:
            with _undone_unless_traced():
                logs, gradients = compiled(computed)(data)
        except RuntimeError as error:
            why = _why_not(error)
            if why is None:
                raise
            warn_once(comm, f"XLA compiles only the updates of {name!r}, not the rest of its step: {why}.")
            return step(data)
        for update, given in zip(updates, gradients, strict=True):
            update.hook.step(update.outer, given, update.variables)
        return logs

    return apart


@contextlib.contextmanager
def _undone_unless_traced() -> Iterator[None]:
    """What a trace that has failed has noted of its own tensors is forgotten."""
    step = current_step()
    before = dict(vars(step)) if step is not None else {}
    try:
        yield
    except Exception:
        if step is not None:
            vars(step).update(before)
        raise


def _why_not(error) -> str | None:
    """Why a step cannot be compiled; None if something else is wrong with it."""
    name = refused(error)
    if name is not None:
        return f"it exchanges ({name}) before its gradients are there"
    return str(error) if isinstance(error, _CannotSplit) else None
