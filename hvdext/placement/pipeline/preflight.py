"""What the ranks of a pipeline tell each other before they train or evaluate."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator, SoloComm
from hvdext.comm.current import current
from hvdext.keras_tools.optimizers import configuration, innermost, learning_rate_of, updaters_of
from hvdext.keras_tools.training import global_seed, is_arrays

_SAVING = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)


def settings_of(model: keras.Model) -> dict[str, Any]:
    """What a compiled model's ranks must agree on, by name."""
    target = innermost(model.optimizer)
    rates = [learning_rate_of(member) for member in updaters_of(target)]  # a pipeline broadcasts none
    return {
        "optimizer": type(model.optimizer).__name__,
        "configuration": configuration(target),
        "learning rate": [float(r.numpy()) if isinstance(r, keras.Variable) else type(r) for r in rates],
        "steps_per_execution": model.steps_per_execution,
    }


def facts_of_fit(
    model: keras.Model, x: Any, callbacks: Any, epochs: int, shuffle: bool, validation: Any, options: Mapping
) -> dict[str, Any]:
    """What ranks that fit a compiled model together must agree on, by name.

    Args:
        model: the model.
        x: of `fit`.
        callbacks: of `fit`.
        epochs: of `fit`.
        shuffle: of `fit`.
        validation: whether there is validation data, or the part that becomes it.
        options: further arguments of `fit`, by name.
    """
    return {
        **settings_of(model),
        "callbacks that save": saving(callbacks),
        "epochs": (options.get("initial_epoch", 0), epochs),
        "validation": (validation, options.get("validation_freq", 1)),
        "shuffle": (shuffle, shuffled_by_keras(x) if shuffle else None),
    }


def callbacks_problem(callbacks: Any) -> str | None:
    """What is wrong with callbacks for a model that several ranks save together; None if nothing."""
    wrong = [one for one in _flat(callbacks) if getattr(one, "runs_on_one_rank", False)]
    if not wrong:
        return None
    return (
        "`callbacks` must not hold AsOneProcess or BestModelCheckpoint for a pipeline, which all ranks save "
        "together: pass Keras' ModelCheckpoint itself, and other callbacks as they are, on all ranks. "
        f"Received: {', '.join(type(one).__name__ for one in wrong)}."
    )


def saving(callbacks: Any) -> list[str]:
    """The kinds of those callbacks that save the model, which a rank cannot do alone."""
    return [type(one).__name__ for one in _flat(callbacks) if isinstance(one, _SAVING)]


def _flat(callbacks):
    found = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
    return tf.nest.flatten(found)


def require_all_call(everyone: Communicator) -> None:
    """Refuses to save or load on one rank alone what several must save and load together.

    Args:
        everyone: who must.

    Raises:
        RuntimeError: within `AsOneProcess`, which makes it an error of all ranks.
    """
    if everyone.size > 1 and isinstance(current(), SoloComm):
        raise RuntimeError(
            "A pipeline's model must be saved and loaded by all ranks together: pass Keras' callbacks "
            "themselves, on all ranks, and not within AsOneProcess. "
            f"Received: a call on one of {everyone.size} ranks."
        )


def begin(
    everyone: Communicator, comm: Communicator, what: str, facts: Mapping[str, Any], problem: str | None
) -> list[int | None]:
    """Compares what ranks are about to do. All of `everyone` call it.

    Args:
        everyone: who begins.
        comm: the pipeline's ranks, among which `facts` must agree.
        what: they do, for the message.
        facts: by name; compared by their `repr`.
        problem: what is wrong with this rank's arguments.

    Returns:
        TensorFlow's global seeds, by rank of the pipeline.

    Raises:
        ValueError: on every rank alike, if a rank has a problem or the facts of a pipeline differ.
    """
    mine = (comm.ranks, problem, {k: repr(v) for k, v in facts.items()}, global_seed())
    met = everyone.allgather_object(mine, "hvdext.placement.begin")
    for problem in (problem for _, problem, _, _ in met if problem is not None):
        raise ValueError(problem)
    for ranks in dict.fromkeys(ranks for ranks, *_ in met):
        views = [view for theirs, _, view, _ in met if theirs == ranks]
        if any(view != views[0] for view in views):
            raise ValueError(agreement.disagreement(what, views, ranks))
    return [seed for ranks, _, _, seed in met if ranks == comm.ranks]


def require_none(comm: Communicator, problem: str | None) -> None:
    """Returns where no rank has a problem. All of `comm` call it.

    Args:
        comm: the pipeline's ranks.
        problem: what is wrong with this rank's arguments.

    Raises:
        ValueError: on every rank alike, with the words of the first rank that has one.
    """
    everyone = comm.allgather_object(problem, "hvdext.placement.problem")
    for first in filter(None, everyone):
        raise ValueError(first)


def shuffled_by_keras(x: Any) -> str | None:
    """What Keras shuffles of training data `x`: "rows", "batches" or nothing."""
    if isinstance(x, keras.utils.PyDataset):
        return None if x.num_batches is None else "batches"
    return "rows" if is_arrays(x) else None


def shuffled_alike(comm: Communicator, x: Any, seeds: list[int | None]) -> Any:
    """`x` so that Keras shuffles it in the same way on all ranks of a pipeline, which call it together.

    Args:
        comm: the pipeline's ranks.
        x: data of which Keras shuffles the same on all.
        seeds: TensorFlow's global ones, which tell the order of rows, by rank; they become equal.
    """
    what = shuffled_by_keras(x)
    if comm.size == 1 or what is None:
        return x
    if what == "batches":
        return ShuffledAlike(x, comm.broadcast_object(random.getrandbits(31), 0, "hvdext.placement.seed"))
    if len(set(seeds)) > 1 or seeds[0] is None:
        fresh = int(np.random.default_rng().integers(2**31)) if seeds[0] is None else seeds[0]
        tf.random.set_seed(comm.broadcast_object(fresh, 0, "hvdext.placement.seed"))
    return x


def require_same_number_of_batches(comm: Communicator, number: int | None) -> None:
    """Refuses data that one rank would wait for in vain. All ranks call it.

    Args:
        comm: the pipeline's ranks.
        number: of batches per epoch; None if it is not known.

    Raises:
        ValueError: on every rank alike, if the known numbers differ.
    """
    numbers = comm.allgather_object(number, "hvdext.placement.batches")
    if len(set(numbers) - {None}) > 1:
        raise ValueError(
            "`x` must hold equally many batches on all ranks of a pipeline. "
            f"Received: by rank: {', '.join(map(str, numbers))} (None: not known)."
        )


class ShuffledAlike(keras.utils.PyDataset):
    """A `PyDataset` in an order that a seed tells, where Keras would ask Python's `random`.

    Args:
        data: with a known number of batches.
        seed: the same on all ranks.
    """

    def __init__(self, data: keras.utils.PyDataset, seed: int):
        super().__init__(data.workers, data.use_multiprocessing, data.max_queue_size)
        self._data = data
        self._random = random.Random(seed)
        self._is_parallel = data.workers > 1 or (data.workers > 0 and data.use_multiprocessing)
        self._shuffle()

    @property
    def num_batches(self) -> int:
        """As `data` says."""
        return self._data.num_batches

    def __getitem__(self, index: int):
        """The batch whose turn it is; a new order begins with 0, unless workers ask out of turn."""
        if index == 0 and not self._is_parallel:
            self._shuffle()
        return self._data[self._order[index]]

    def on_epoch_begin(self) -> None:
        """As `data` has it."""
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """As `data` has it; the workers have been stopped."""
        self._data.on_epoch_end()
        if self._is_parallel:
            self._shuffle()

    def _shuffle(self):
        order = list(range(self.num_batches))
        self._random.shuffle(order)
        self._order = order
