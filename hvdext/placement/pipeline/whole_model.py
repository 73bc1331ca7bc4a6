"""The whole model of a pipeline: a graph on every rank, its values spread over them; saved and loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import raise_on_all
from hvdext.common.log import warn
from hvdext.keras_tools.custom_objects import fresh_copy
from hvdext.keras_tools.deferred import give_value, take_value
from hvdext.keras_tools.functional import Calls, unallocated
from hvdext.keras_tools.models import flat_layers
from hvdext.keras_tools.optimizers import build
from hvdext.keras_tools.selection import described
from hvdext.keras_tools.slice_marks import mark_of
from hvdext.keras_tools.slots import common_variables, is_composed, positions_of, slots_of
from hvdext.placement.pipeline.vocabularies import gather_vocabularies
from hvdext.placement.pipeline.whole_file import read_optimizer, read_weights
from hvdext.placement.plan.plan import Plan
from hvdext.placement.slices.operators import joined
from hvdext.placement.slices.uncut import compile_alike, is_cut, uncut_clone


@dataclass
class WholeModel:
    """The uncut model, of whose variables a rank holds those of its own stage; the others have no values.

    Where layers of it are cut, too (`slices.size` > 1), a rank holds its slices of its stage's variables.

    Attributes:
        calls: the model, read.
        plan: which layer is where.
        comm: the pipeline's ranks.
        slices: the ranks that hold slices of the same stage.
        replicas: the ranks that hold the same stage in pipelines side by side; the first pipeline writes.
        everyone: the ranks of all pipelines.
    """

    calls: Calls
    plan: Plan
    comm: Communicator
    slices: Communicator
    replicas: Communicator
    everyone: Communicator
    _operations: dict[str, Any] = field(init=False)
    _as_cut: dict[str, list[str]] = field(init=False)

    def __post_init__(self):
        self._operations = {call.path: call.operation for call in self.calls.calls}
        self._as_cut = {path: _variables_in(operation) for path, operation in self._operations.items()}

    @property
    def model(self) -> keras.Model:
        """The Keras model."""
        return self.calls.model

    @property
    def writes(self) -> bool:
        """Whether this rank is the one that writes files."""
        return self.everyone.rank == 0

    def rank_of(self, path: str) -> int:
        """The rank that holds the layer at `path`."""
        return self.plan.place_of(path) % self.comm.size

    def is_here(self, path: str) -> bool:
        """Whether this rank holds the layer at `path`."""
        return self.rank_of(path) == self.comm.rank

    def wait_for_all(self) -> None:
        """Returns once all ranks of all pipelines have called it."""
        self.everyone.barrier("hvdext.placement.end")

    def change_in(self, source: keras.Model) -> str | None:
        """What has become of the layers since the model was cut, so that ranks would not meet; None: nothing.

        Whether they are trained may change.

        Args:
            source: this rank's pipeline.
        """
        for path in filter(self.is_here, self._operations):
            now = _variables_in(self._operations[path])
            if now != self._as_cut[path]:
                return _changed(f"layer {path!r} with {now}, which had {self._as_cut[path]} when it was cut")
        held = {id(v) for path, layer in self._operations.items() for v in getattr(layer, "weights", [])}
        others = [v.path for v in source.weights if id(v) not in held]
        if others:
            return _changed(f"the weights {others}, which no layer of the model had when it was cut")
        ran = {id(one) for one in self._operations.values() if isinstance(one, keras.layers.Layer)}
        strange = [one.name for stage in source.stages for one in stage.held if id(one) not in ran]
        return _changed(f"the layers {strange}, which were not there when it was cut") if strange else None

    def save(self, path: str | os.PathLike, source: keras.Model, **options) -> None:
        """One rank writes the model with all ranks' values, and with the optimizer's state if there is any.

        All ranks call it. That rank holds the whole model meanwhile.

        Args:
            path: a file that `Model.save` takes.
            source: this rank's pipeline, as whose the whole model is compiled.
            **options: handed to `Model.save`.

        Raises:
            OSError: on every rank alike, if the file cannot be written.
            ValueError: on every rank alike, if Keras does not take an argument.
            RuntimeError: on every rank alike, if Keras fails in another way.
        """
        self._write("save", path, source, lambda model: model.save(path, **options))

    def save_weights(self, path: str | os.PathLike, source: keras.Model, **options) -> None:
        """As `save`, but what `Model.save_weights` writes: weights and the optimizer's state."""
        self._write("save_weights", path, source, lambda model: model.save_weights(path, **options))

    def load_weights(self, path: str | os.PathLike, optimizer=None, **options) -> None:
        """Reads this rank's layers, and no others, from a file that plain Keras or `save` has written.

        All ranks call it. As in Keras, a built optimizer's state is taken over if it is in the file and fits.

        Args:
            path: a `.keras` or `.weights.h5` file.
            optimizer: this stage's, or None.
            **options: as for `Model.load_weights`.

        Raises:
            OSError: on every rank alike, if a rank cannot read the file.
            ValueError: on every rank alike, if it is of another kind, or of another model.
        """

        def read(file):
            read_weights(self.model, file, self.is_here, options)
            if optimizer is not None and not is_composed(optimizer):
                problem = read_optimizer(self.model, file, optimizer)
                if problem is not None:
                    warn(f"The optimizer stays as it is. {problem}")

        self._load("load_weights", path, read)

    def load_checkpoint(self, path: str | os.PathLike, optimizer) -> None:
        """As `load_weights`, and this stage's part of the optimizer's state; `optimizer` must be built.

        Raises:
            OSError: on every rank alike, if a rank cannot read the file.
            ValueError: on every rank alike, if it is of another kind, or of another model, or holds no
                optimizer state that fits.
        """

        def read(file):
            read_weights(self.model, file, self.is_here, {})
            problem = read_optimizer(self.model, file, optimizer)
            if problem is not None:
                raise ValueError(problem)

        self._load("load_checkpoint", path, read)

    # -- writing ---------------------------------------------------------------------------------------

    def _write(self, what: str, path, source, write: Callable[[keras.Model], None]) -> None:
        change = self.change_in(source)
        raise_on_all(
            self.everyone,
            None if change is None else ValueError(change),
            f"{what} of the pipeline {self.model.name!r} to {str(path)!r} has failed",
            "hvdext.placement.problem",
        )
        error = None
        if self.replicas.rank == 0:
            self._tell_trainable()
            gather_vocabularies(self.comm, self.calls, self.is_here)
            values = self._gather_weights()
            state = self._gather_optimizer(source.optimizer if source.compiled else None)
            if self.writes:
                try:
                    with self._filled(values) as model:
                        self._compile(model, source, state)
                        write(model)
                except Exception as problem:  # the others wait, and must hear of it
                    error = problem
        raise_on_all(
            self.everyone,
            error,
            f"{what} of the pipeline {self.model.name!r} to {str(path)!r} has failed",
            "hvdext.placement.problem",
        )

    def _gather_weights(self) -> dict[int, np.ndarray]:
        """Bytes by the `id` of the whole model's variables: on the rank that writes, what it lacks."""
        found: dict[int, np.ndarray] = {}
        seen = set()
        keeps = self.writes and not is_cut(self.model)
        for path, operation in self._operations.items():
            owner = self.rank_of(path)
            for variable in getattr(operation, "weights", []):
                if id(variable) in seen:
                    continue
                seen.add(id(variable))
                value = self._from(owner, variable, variable)
                if self.writes and not (keeps and owner == self.comm.rank):
                    found[id(variable)] = value
        return found

    @contextlib.contextmanager
    def _filled(self, values: dict[int, np.ndarray]) -> Iterator[keras.Model]:
        """The whole model as plain Keras has it, with all values; empties `values`."""
        model = unallocated(lambda: uncut_clone(self.model))[0] if is_cut(self.model) else self.model
        filled = []
        try:
            for own, variable in zip(self.model.weights, model.weights, strict=True):
                value = values.pop(id(own), None)
                if value is not None:
                    give_value(variable, _array(value, variable))
                    filled.append(variable)
            yield model
        finally:
            for variable in filled:
                take_value(variable)
            model.optimizer = None
            model.compiled = False

    def _from(self, owner: int, held, trained) -> np.ndarray:
        """The bytes of what rank `owner` holds, whole; of use on the rank that writes.

        Args:
            owner: a rank of the pipeline.
            held: a variable, on rank `owner`.
            trained: the weight that it is, or stands beside, on rank `owner`: cut as that is.
        """
        data = np.zeros(0, np.uint8)
        if owner == self.comm.rank:
            value, mark = tf.convert_to_tensor(held), mark_of(trained)
            if mark is not None and held.shape == trained.shape:
                # A name for each number of axes: functions traced for several know no shape at all.
                name = f"hvdext.placement.slices.{value.shape.rank}"
                value = joined(self.slices, value, mark[0].axis, name)
            data = np.frombuffer(value.numpy().tobytes(), np.uint8)
        if self.slices.rank != 0:
            return data
        return self.comm.allgather(tf.constant(data), "hvdext.placement.whole").numpy()

    def _tell_trainable(self) -> None:
        """What a rank has frozen is frozen in the saved model, too: layers, those in them, variables."""
        parts = {
            path: [*flat_layers(operation), *operation.variables]
            for path, operation in self._operations.items()
            if isinstance(operation, keras.layers.Layer)
        }
        mine = {path: [one.trainable for one in parts[path]] for path in parts if self.is_here(path)}
        for theirs in self.comm.allgather_object(mine, "hvdext.placement.trainable"):
            for path, flags in theirs.items():
                for one, trainable in zip(
                    parts[path], flags, strict=True
                ):  # layers hand on what they are told
                    if one.trainable != trainable:
                        one.trainable = trainable

    def _gather_optimizer(self, optimizer) -> tuple[list, dict] | None:
        """The common variables' values, and the slots' bytes by kind and index in the whole model."""
        mine = {}
        has_state = optimizer is not None and optimizer.built and not is_composed(optimizer)
        if has_state:
            positions = positions_of(optimizer, self.model)
            mine = {
                (slot.kind, positions[slot.index]): slot.variable
                for slot in slots_of(optimizer)
                if slot.index in positions
            }
        common = [v.numpy() for v in common_variables(optimizer)] if has_state else None
        everyone = self.comm.allgather_object((sorted(mine), common), "hvdext.placement.slots")
        if everyone[0][1] is None:
            if optimizer is not None and is_composed(optimizer):
                warn("The state of a MultiOptimizer is not saved with a pipeline's model.")
            return None
        trained = self.model.trainable_variables
        slots = {}
        for owner, (keys, _) in enumerate(everyone):
            for key in keys:
                value = self._from(owner, mine.get(key), trained[key[1]])
                if self.writes:
                    slots[key] = value
        return everyone[0][1], slots

    def _compile(self, model, source, state: tuple[list, dict] | None) -> None:
        if not source.compiled:
            return
        given = source.optimizer
        optimizer = None if given is None or is_composed(given) else fresh_copy(given)
        compile_alike(model, source, optimizer, jit_compile="auto")
        if optimizer is None:
            return
        build(optimizer, model.trainable_variables)
        if state is None:
            return
        common, slots = state
        for variable, value in zip(common_variables(optimizer), common, strict=True):
            variable.assign(value)
        for slot in slots_of(optimizer):
            value = slots.pop((slot.kind, slot.index), None)
            if value is not None:  # unless it was frozen when the optimizer was built
                slot.variable.assign(_array(value, slot.variable))

    # -- reading ---------------------------------------------------------------------------------------

    def _load(self, what: str, path, read: Callable[[str], None]) -> None:
        error = None
        try:
            file = os.fspath(path)
            if not file.endswith((".keras", ".weights.h5")):
                raise ValueError(
                    f"`filepath` must end in .keras or .weights.h5. Received: filepath={file!r}."
                )
            read(file)
        except Exception as problem:  # of one rank, whose host may lack the file
            error = problem
        raise_on_all(
            self.everyone,
            error,
            f"{what} of the pipeline {self.model.name!r} from {str(path)!r} has failed",
            "hvdext.placement.problem",
        )


def _variables_in(operation) -> list[str]:
    return described(getattr(operation, "variables", []))


def _changed(received: str) -> str:
    return (
        "A pipeline's layers must stay as they were when it was cut, but for being trained or not: change "
        "the model before hvd.pipeline, or open a saved file in plain Keras and change that. "
        f"Received: {received}."
    )


def _array(data: np.ndarray, variable) -> np.ndarray:
    return np.frombuffer(data.tobytes(), tf.as_dtype(variable.dtype).as_numpy_dtype).reshape(variable.shape)
