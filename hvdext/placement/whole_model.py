"""The whole model of a pipeline: a graph on every rank, its values spread over them; saved and loaded."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np
import tensorflow as tf
from keras.src.saving import saving_lib

from hvdext.comm import Communicator
from hvdext.optimizer import innermost
from hvdext.placement.plan import Plan
from hvdext.placement.reading import Calls

_ARCHIVE_WEIGHTS = "model.weights.h5"
_OPTIMIZER_VARIABLES = "optimizer/vars"


@dataclass(frozen=True)
class Slot:
    """A variable that an optimizer keeps beside a trained one.

    Attributes:
        kind: which of the optimizer's lists it is in, such as "_momentums".
        index: the trained variable's, in the optimizer's order.
        variable: the slot itself.
    """

    kind: str
    index: int
    variable: Any


def slots_of(optimizer: keras.optimizers.Optimizer) -> list[Slot]:
    """The variables of a built optimizer that belong to one trained variable each."""
    target = innermost(optimizer)
    count = len(target._trainable_variables)
    slots = []
    for kind, values in sorted(vars(target).items()):
        if kind in ("_variables", "_trainable_variables") or not isinstance(values, list):
            continue
        if len(values) == count and all(v is None or isinstance(v, keras.Variable) for v in values):
            slots += [Slot(kind, i, v) for i, v in enumerate(values) if v is not None]
    return slots


def common_variables(optimizer: keras.optimizers.Optimizer) -> list:
    """The variables of a built optimizer that all stages have alike: counters, learning rate, loss scale."""
    own = {id(slot.variable) for slot in slots_of(optimizer)}
    return [variable for variable in optimizer.variables if id(variable) not in own]


@dataclass
class WholeModel:
    """The uncut model, of whose variables a rank holds those of its own stage; the others have no values.

    Attributes:
        calls: the model, read.
        plan: which layer is where.
        comm: the pipeline's ranks.
        replicas: the ranks that hold the same stage in pipelines side by side; the first pipeline writes.
        everyone: the ranks of all pipelines.
    """

    calls: Calls
    plan: Plan
    comm: Communicator
    replicas: Communicator
    everyone: Communicator
    _operations: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self._operations = {call.path: call.operation for call in self.calls.calls}

    @property
    def model(self) -> keras.Model:
        """The Keras model."""
        return self.calls.model

    def rank_of(self, path: str) -> int:
        """The rank that holds the layer at `path`."""
        return self.plan.place_of(path) % self.comm.size

    def wait_for_all(self) -> None:
        """Returns once all ranks of all pipelines have called it."""
        self.everyone.barrier("hvdext.placement.end")

    def save(self, path: str | os.PathLike, compile_config: dict, optimizer, **options) -> None:
        """Rank 0 writes the model with all ranks' values, and with the optimizer's state if there is any.

        All ranks call it. Rank 0 holds the whole model meanwhile.

        Args:
            path: a file that `Model.save` takes.
            compile_config: of `Model.get_compile_config`; empty: not compiled.
            optimizer: this stage's optimizer, or None.
            **options: handed to `Model.save`.
        """
        if self.replicas.rank == 0:
            self._tell_trainable()
            filled = self._gather_weights()
            state = self._gather_optimizer(optimizer)
            try:
                if self.comm.rank == 0:
                    self._compile(compile_config, state)
                    self.model.save(path, **options)
            finally:
                self._forget(filled)
        self.wait_for_all()

    def save_weights(self, path: str | os.PathLike, **options) -> None:
        """As `save`, but the weights only (`Model.save_weights`)."""
        if self.replicas.rank == 0:
            filled = self._gather_weights()
            try:
                if self.comm.rank == 0:
                    self.model.save_weights(path, **options)
            finally:
                self._forget(filled)
        self.wait_for_all()

    def load_weights(self, path: str | os.PathLike, **options) -> None:
        """Reads this rank's layers, and no others, from a file that plain Keras or `save` has written.

        Raises:
            ValueError: if it is no `.keras` or `.weights.h5` file.
        """
        if not str(path).endswith((".keras", ".weights.h5")):
            raise ValueError(
                f"`filepath` must end in .keras or .weights.h5. Received: filepath={str(path)!r}."
            )
        saving_lib.load_weights_only(self.model, path, objects_to_skip=self._foreign(), **options)

    def load_optimizer(self, path: str | os.PathLike, optimizer) -> None:
        """Reads this stage's part of the optimizer's state from a `.keras` file; `optimizer` must be built.

        Raises:
            ValueError: if the file holds no optimizer state that fits.
        """
        numbers = self._numbers_in_file(optimizer)
        with zipfile.ZipFile(path) as archive, archive.open(_ARCHIVE_WEIGHTS) as weights:
            file = h5py.File(io.BytesIO(weights.read()), "r")
        with file:
            group = file.get(_OPTIMIZER_VARIABLES)
            whole = 0 if group is None else len(group)
            wanted = [number for number, _ in numbers]
            if group is None or any(str(number) not in group for number in wanted):
                raise ValueError(
                    "`filepath` must be a .keras file whose model was saved with the state of an optimizer "
                    "of this kind. "
                    f"Received: filepath={str(path)!r} with {whole} optimizer variables."
                )
            for number, variable in numbers:
                variable.assign(group[str(number)][()])

    # -- weights ---------------------------------------------------------------------------------------

    def _foreign(self) -> list:
        return [op for path, op in self._operations.items() if self.rank_of(path) != self.comm.rank]

    def _gather_weights(self) -> list:
        """Rank 0 gets the values of all weights; returns the variables that have one for the time being."""
        filled, seen = [], set()
        for path, operation in self._operations.items():
            owner = self.rank_of(path)
            for variable in getattr(operation, "weights", []):
                if id(variable) in seen:
                    continue
                seen.add(id(variable))
                value = self._from(owner, variable.numpy() if owner == self.comm.rank else None)
                if self.comm.rank == 0 and owner != 0:
                    variable._initialize(_array(value, variable))
                    filled.append(variable)
        return filled

    def _forget(self, filled: Sequence) -> None:
        for variable in filled:
            variable._value = None
        self.model.optimizer = None
        self.model.compiled = False

    def _from(self, owner: int, value: np.ndarray | None) -> np.ndarray:
        """The bytes of rank `owner`'s array, on every rank."""
        mine = owner == self.comm.rank
        data = (
            np.frombuffer(value.tobytes(), np.uint8) if mine and value is not None else np.zeros(0, np.uint8)
        )
        return self.comm.allgather(tf.constant(data), "hvdext.placement.whole").numpy()

    def _tell_trainable(self) -> None:
        """Layers that a rank has frozen are frozen in the saved model, too."""
        mine = {
            path: operation.trainable
            for path, operation in self._operations.items()
            if self.rank_of(path) == self.comm.rank and isinstance(operation, keras.layers.Layer)
        }
        for flags in self.comm.allgather_object(mine, "hvdext.placement.trainable"):
            for path, trainable in flags.items():
                if self._operations[path].trainable != trainable:
                    self._operations[path].trainable = trainable

    # -- optimizer -------------------------------------------------------------------------------------

    def _positions(self, optimizer) -> dict[int, int]:
        """For each variable that this stage trains (by its index there) its index in the whole model."""
        places = {id(v): i for i, v in enumerate(self.model.trainable_variables)}
        trained = innermost(optimizer)._trainable_variables
        return {i: places[id(v)] for i, v in enumerate(trained) if id(v) in places}

    def _gather_optimizer(self, optimizer) -> tuple[list, dict] | None:
        """The common variables' values, and the slots' bytes by kind and index in the whole model."""
        has_state = optimizer is not None and optimizer.built and not _is_composed(optimizer)
        mine = {}
        if has_state:
            positions = self._positions(optimizer)
            mine = {
                (slot.kind, positions[slot.index]): slot.variable
                for slot in slots_of(optimizer)
                if slot.index in positions
            }
        common = [v.numpy() for v in common_variables(optimizer)] if has_state else None
        everyone = self.comm.allgather_object((sorted(mine), common), "hvdext.placement.slots")
        if everyone[0][1] is None:
            if optimizer is not None and _is_composed(optimizer):
                warnings.warn(
                    "The state of a MultiOptimizer is not saved with a pipeline's model.", stacklevel=3
                )
            return None
        slots = {}
        for owner, (keys, _) in enumerate(everyone):
            for key in keys:
                value = self._from(owner, mine[key].numpy() if owner == self.comm.rank else None)
                if self.comm.rank == 0:
                    slots[key] = value
        return everyone[0][1], slots

    def _compile(self, config: dict, state: tuple[list, dict] | None) -> None:
        if not config:
            return
        self.model.compile_from_config(config)  # builds the optimizer
        if state is None or self.model.optimizer is None:
            return
        common, slots = state
        optimizer = self.model.optimizer
        for variable, value in zip(common_variables(optimizer), common, strict=True):
            variable.assign(value)
        for slot in slots_of(optimizer):
            slot.variable.assign(_array(slots[slot.kind, slot.index], slot.variable))

    def _numbers_in_file(self, optimizer) -> list[tuple[int, Any]]:
        """(number of a variable of the whole model's optimizer, this stage's variable that it belongs to)."""
        whole = optimizer.__class__.from_config(optimizer.get_config())
        whole.build([_tiny(variable) for variable in self.model.trainable_variables])
        numbers = {id(variable): i for i, variable in enumerate(whole.variables)}
        theirs = {(slot.kind, slot.index): slot.variable for slot in slots_of(whole)}
        positions = self._positions(optimizer)
        pairs = [
            (theirs[slot.kind, positions[slot.index]], slot.variable)
            for slot in slots_of(optimizer)
            if slot.index in positions
        ]
        pairs += list(zip(common_variables(whole), common_variables(optimizer), strict=True))
        return [(numbers[id(their)], own) for their, own in pairs]


def _tiny(variable) -> keras.Variable:
    """A variable for which an optimizer keeps the same slots as for `variable`, only smaller ones."""
    tiny = keras.Variable(np.zeros((1,) * len(variable.shape)), dtype=variable.dtype, name=variable.name)
    tiny._path = variable.path
    tiny.overwrite_with_gradient = variable.overwrite_with_gradient
    return tiny


def _is_composed(optimizer) -> bool:
    return bool(getattr(innermost(optimizer), "optimizers", []))


def _array(data: np.ndarray, variable) -> np.ndarray:
    return np.frombuffer(data.tobytes(), tf.as_dtype(variable.dtype).as_numpy_dtype).reshape(variable.shape)
