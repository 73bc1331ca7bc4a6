"""One rank's part of a batch: its passes and messages in the order of its program, gradients added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from hvdext.gradients.tensors import is_overwritten
from hvdext.placement.pipeline.messages import Channel
from hvdext.placement.pipeline.schedule import Action, Compute, Transfer
from hvdext.placement.pipeline.stages import Parcel, Stage

# (micro-batch, the model's outputs or None, additional losses) -> what is differentiated, or None
Objective = Callable[[int, "list[tf.Tensor] | None", list], "tf.Tensor | None"]


@dataclass(frozen=True)
class Runner:
    """Runs the chunks of one rank.

    Attributes:
        rank: of the pipeline.
        stages: this rank's, by chunk.
        last: the number of the model's last chunk.
        boundaries: for each pair of neighbouring chunks what travels.
        channels: to the other ranks, by rank.
        name: part of the messages' names.
        recompute: whether a forward pass keeps only what came in, and is made once more before its backward
            pass.
    """

    rank: int
    stages: Mapping[int, Stage]
    last: int
    boundaries: Sequence[Sequence[Parcel]]
    channels: Mapping[int, Channel]
    name: str
    recompute: bool

    def forward(
        self,
        program: Sequence[Action],
        inputs: Sequence,
        after: tf.Tensor,
        take_losses: Callable[[list], None],
    ) -> tuple[list[list[tf.Tensor]], list[tf.Tensor]]:
        """Runs a program of forward passes.

        Args:
            program: this rank's actions.
            inputs: for each micro-batch the model's inputs; empty where chunk 0 is elsewhere.
            after: no message travels before this tensor is there.
            take_losses: gets the additional losses of each pass.

        Returns:
            For each micro-batch the model's outputs, empty where the last chunk is elsewhere; and tensors
            that are there once all this rank's messages have come and gone.
        """
        batch = _Batch(self, inputs, after, lambda k, outputs, losses: take_losses(losses), training=False)
        return batch.run(program), batch.transfers

    def train(
        self, program: Sequence[Action], inputs: Sequence, after: tf.Tensor, objective: Objective
    ) -> tuple[list[list[tf.Tensor]], dict[int, Any], list[tf.Tensor]]:
        """Runs a program of forward and backward passes.

        Args:
            program: this rank's actions.
            inputs: as in `forward`.
            after: as in `forward`.
            objective: called once for each pass: makes of the model's outputs (None except in the last chunk)
                and of the additional losses what is differentiated. The gradients of all passes are summed.

        Returns:
            The model's outputs as in `forward`, the gradients by the id of their variable (None where there
            is none), and tensors that are there once all messages have come and gone.
        """
        batch = _Batch(self, inputs, after, objective, training=True)
        outputs = batch.run(program)
        gradients = {key: _summed(parts) for key, parts in batch.gradients.items()}
        return outputs, gradients, batch.transfers


@dataclass
class _Kept:
    """What a backward pass needs of its forward pass."""

    taken: list[tf.Tensor]
    given: list[tf.Tensor] = field(default_factory=list)
    target: tf.Tensor | None = None
    tape: tf.GradientTape | None = None
    state: list[tuple] = field(default_factory=list)  # (variable, value), for a second forward pass


class _Batch:
    """The state of one batch on its way through a program."""

    def __init__(self, runner: Runner, inputs, after, objective: Objective, training: bool):
        self._runner = runner
        self._after = after
        self._objective = objective
        self._training = training
        self._activations = {(-1, k): list(tensors) for k, tensors in enumerate(inputs)}
        self._backward: dict[tuple[int, int], list] = {}  # gradients by boundary and micro-batch
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._outputs: dict[int, list] = {}
        self._barrier: list = []
        self.gradients: dict[int, list] = {}
        self.transfers: list[tf.Tensor] = []

    def run(self, program: Sequence[Action]) -> list[list[tf.Tensor]]:
        """Carries out `program`; returns the model's outputs by micro-batch."""
        for action in program:
            if isinstance(action, Transfer):
                self._transfer(action)
            elif action.kind == "forward":
                self._pass_forward(action)
            else:
                self._pass_backward(action)
        return [self._outputs[k] for k in sorted(self._outputs)]

    # -- messages ------------------------------------------------------------------------------------

    def _transfer(self, message: Transfer) -> None:
        runner = self._runner
        back = message.kind == "gradients"
        store = self._backward if back else self._activations
        parcels = runner.boundaries[message.boundary]
        specs = [parcel.spec for parcel in parcels if parcel.has_gradient or not back]
        key = (message.boundary, message.microbatch)
        name = f"hvdext.pipeline.{runner.name}.{message.kind}.{message.boundary}.{message.microbatch}"
        if message.source == runner.rank:
            self.transfers.append(runner.channels[message.target].send(store.pop(key), specs, name))
        else:
            store[key] = runner.channels[message.source].receive(specs, name, self._after)
            self.transfers += store[key]

    # -- passes --------------------------------------------------------------------------------------

    def _pass_forward(self, action: Compute) -> None:
        chunk, k = action.chunk, action.microbatch
        stage = self._runner.stages[chunk]
        kept = _Kept(self._in_turn(self._activations.pop((chunk - 1, k))))
        if not self._training:
            kept.given = stage(kept.taken, training=False)
            self._objective(k, self._if_last(chunk, kept.given), stage.losses)
        elif self._runner.recompute:
            kept.state = [(v, tf.identity(v.value)) for v in stage.non_trainable_variables]
            kept.given = stage(kept.taken, training=True)
        else:
            kept.tape = self._watch(stage, kept)
            with kept.tape:
                kept.given = stage(kept.taken, training=True)
                kept.target = self._objective(k, self._if_last(chunk, kept.given), stage.losses)
        if chunk == self._runner.last:
            self._outputs[k] = kept.given
        else:
            self._activations[chunk, k] = kept.given
        if self._training:
            self._kept[chunk, k] = kept
        self._finish(kept.given)

    def _pass_backward(self, action: Compute) -> None:
        chunk, k = action.chunk, action.microbatch
        stage = self._runner.stages[chunk]
        kept = self._kept.pop((chunk, k))
        # The arriving gradients, and for the objective the number 1, wait for the pass before.
        *incoming, one = self._in_turn([*self._backward.pop((chunk, k), []), tf.ones([])])
        if kept.tape is None:
            self._repeat(stage, kept, chunk, k, [*incoming, one])
        assert kept.tape is not None
        leaving = [t for t, p in zip(kept.given, stage.chunk.gives, strict=True) if p.has_gradient]
        pairs = list(zip(leaving, incoming, strict=True)) if chunk < self._runner.last else []
        if kept.target is not None:
            pairs.append((kept.target, tf.cast(one, kept.target.dtype)))
        arrived = _with_gradient(kept.taken, stage.chunk.takes) if chunk else []
        variables = stage.trainable_variables
        sources = [*arrived, *(v.value for v in variables)]
        gradients = [None] * len(sources)
        if pairs and sources:
            targets, upstream = zip(*pairs, strict=True)
            gradients = kept.tape.gradient(list(targets), sources, output_gradients=list(upstream))
        if chunk:
            self._backward[chunk - 1, k] = [
                tf.zeros_like(t) if g is None else tf.convert_to_tensor(g)
                for t, g in zip(arrived, gradients[: len(arrived)], strict=True)
            ]
        done = self._backward.get((chunk - 1, k), [])
        self._finish([*done, *self._add(variables, gradients[len(arrived) :])])

    def _repeat(self, stage, kept: _Kept, chunk: int, k: int, after: list) -> None:
        """The forward pass once more, with the same random numbers, leaving the statistics as they are."""
        with tf.control_dependencies(after):
            # New tensors, which wait for the gradients: otherwise this pass would run at once, and TensorFlow
            # would find that it has been made already.
            kept.taken = [tf.identity(tensor) for tensor in kept.taken]
        kept.tape = self._watch(stage, kept)
        with kept.tape:
            with keras.StatelessScope(kept.state, collect_losses=True) as scope:
                kept.given = stage(kept.taken, training=True)
            # What layers have added is in the scope; outside, the stage has the penalties of its weights
            # only.
            losses = [*scope.losses, *stage.losses]
            kept.target = self._objective(k, self._if_last(chunk, kept.given), losses)

    def _watch(self, stage, kept: _Kept) -> tf.GradientTape:
        tape = tf.GradientTape()
        with tape:
            for tensor in _with_gradient(kept.taken, stage.chunk.takes):
                tape.watch(tensor)
        return tape

    def _if_last(self, chunk: int, given: list) -> list | None:
        return given if chunk == self._runner.last else None

    # -- order and sums ------------------------------------------------------------------------------

    def _in_turn(self, tensors: list) -> list:
        """`tensors`, once the pass before has ended: two at a time would both end late."""
        with tf.control_dependencies(self._barrier):
            return [tf.identity(tensor) for tensor in tensors]

    def _finish(self, results: list) -> None:
        if tf.executing_eagerly():
            return
        with tf.control_dependencies([r.values if isinstance(r, tf.IndexedSlices) else r for r in results]):
            self._barrier = [tf.no_op()]

    def _add(self, variables, gradients) -> list:
        """Adds gradients to those of the micro-batches before; returns the sums."""
        results = []
        for variable, gradient in zip(variables, gradients, strict=True):
            so_far = self.gradients.setdefault(id(variable), [])
            if gradient is None:
                continue
            if isinstance(gradient, tf.IndexedSlices):
                so_far.append(gradient)
            elif so_far and not isinstance(so_far[-1], tf.IndexedSlices):
                add = tf.maximum if is_overwritten(variable) else tf.add
                so_far[-1] = add(so_far[-1], gradient)
            else:
                so_far.append(gradient)
            results.append(so_far[-1])
        return results


def _with_gradient(tensors, parcels) -> list:
    return [tensor for tensor, parcel in zip(tensors, parcels, strict=True) if parcel.has_gradient]


def _summed(parts: list):
    """One gradient: None, a tensor, or the slices of all micro-batches, as those of one large batch."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, tf.IndexedSlices) for part in parts):
        values = tf.concat([part.values for part in parts], 0)
        return tf.IndexedSlices(values, tf.concat([part.indices for part in parts], 0), parts[0].dense_shape)
    return tf.add_n([tf.convert_to_tensor(part) for part in parts])
