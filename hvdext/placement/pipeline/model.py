"""`PipelineModel`: one rank's stages of a model, trained, evaluated and asked as a Keras model."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from keras.optimizers import LossScaleOptimizer
from keras.src import backend

from hvdext.comm import agreement
from hvdext.gradients.apply_hook import hook_of
from hvdext.gradients.tensors import map_gradient, squared_norm
from hvdext.keras_tools.functional import function_of
from hvdext.keras_tools.optimizers import build, innermost, updaters_of
from hvdext.placement.pipeline.backup import led
from hvdext.placement.pipeline.batch_check import COUNT, checks_of, marks_of, with_rows_of
from hvdext.placement.pipeline.data import (
    complete,
    digest,
    first_batch,
    first_rows,
    is_arrays,
    microbatch_problem,
    rows_of,
)
from hvdext.placement.pipeline.messages import Spec, pack, unpack
from hvdext.placement.pipeline.preflight import (
    ShuffledAlike,
    begin,
    callbacks_problem,
    check_all_call,
    check_number_of_batches,
    saving,
    settings_of,
    shuffled_alike,
    shuffled_by_keras,
)
from hvdext.placement.pipeline.running import Runner
from hvdext.placement.pipeline.schedule import Action
from hvdext.placement.pipeline.update_order import update_in_turn
from hvdext.placement.pipeline.whole_model import WholeModel


@dataclass(frozen=True)
class Settings:
    """How a pipeline runs.

    Attributes:
        microbatches: of each batch.
        training: this rank's actions for a batch, forward and backward.
        inference: its actions forward only.
    """

    microbatches: int
    training: Sequence[Action]
    inference: Sequence[Action]


class PipelineModel(keras.Model):
    """The part of a model that one rank of a pipeline holds; `hvd.pipeline` makes it.

    It is used as any Keras model, by all ranks of the pipeline together: every rank calls `compile`, `fit`,
    `evaluate`, `predict`, `save`, ... with the same arguments and callbacks. Its weights, layers and
    optimizer slots are those of this rank's stages.

    Data: the first stage needs `x`, the last one `y` and `sample_weight`; what else a rank is given counts by
    its number of rows only, and may be None. Losses and metrics are the whole model's, on every rank.

    Attributes:
        stages: this rank's chunks of the model, as layers.
        whole: the uncut model, with values for this rank's layers only.
        microbatches: into how many a batch is cut.
    """

    def __init__(self, whole: WholeModel, runner: Runner, settings: Settings):
        super().__init__(name=whole.model.name, dtype=whole.model.dtype_policy)
        self.whole = whole
        self.stages = list(runner.stages.values())
        self.microbatches = settings.microbatches
        if hasattr(whole.model, "output_names"):  # which Keras names losses and metrics by
            self.output_names = list(whole.model.output_names)
        self._comm = whole.comm
        self._runner = runner
        self._settings = settings
        self._is_first = whole.comm.rank == 0
        self._is_last = whole.comm.rank == runner.last % whole.comm.size
        self._stand_in = _StandIn()
        self._is_prepared = False
        self.built = True

    # -- Keras' methods, in the order of their use -------------------------------------------------------

    def compile(self, optimizer="rmsprop", loss=None, *, jit_compile="auto", **options) -> None:
        """As `keras.Model.compile`; all ranks pass the same.

        Raises:
            ValueError: without a loss, with `jit_compile=True` (XLA cannot compile the engine's collectives),
                or with `global_clipnorm` where its norm cannot be made over all stages.
        """
        if jit_compile is True:
            raise ValueError(
                "`jit_compile` must be False or 'auto' for a pipeline: XLA cannot compile the engine's "
                "collectives. Received: jit_compile=True."
            )
        if loss is None:
            raise ValueError("`loss` must be given for a pipeline. Received: loss=None.")
        super().compile(optimizer, loss, jit_compile=False, **options)
        self._is_prepared = False
        if self.optimizer is not None:
            target = innermost(self.optimizer)
            self._clip_over_stages(target)
            for one in updaters_of(target):
                update_in_turn(one)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        **options,
    ):
        """As `keras.Model.fit`.

        Data sets must give the same batches in the same order on every rank. Arrays and a `PyDataset` are
        shuffled alike.

        Raises:
            ValueError: on every rank alike, if `microbatches` does not divide a batch's rows, x or y is
                missing where it is needed, ranks differ in settings, first batches or their number, or
                `callbacks` holds AsOneProcess or BestModelCheckpoint, which would save on one rank only.
            tf.errors.InvalidArgumentError: on every rank alike and before the update, if later batches
                differ.
        """
        self._assert_compile_called("fit")
        problem = self._callbacks_problem(callbacks)
        try:
            x, y = self._complete(x, y)
            if isinstance(validation_data, (tuple, list)):
                validation_data = (*self._complete(*validation_data[:2]), *validation_data[2:])
            if is_arrays(x) and options.get("steps_per_epoch") is None:
                rows = math.floor(first_rows(x) * (1 - (0 if validation_data else validation_split)))
                problem = problem or microbatch_problem(self.microbatches, rows, batch_size or 32)
        except ValueError as error:
            problem = problem or str(error)
        facts = {
            **settings_of(self),
            "callbacks that save": saving(callbacks),
            "epochs": (options.get("initial_epoch", 0), epochs),
            "validation": (
                validation_data is not None or validation_split,
                options.get("validation_freq", 1),
            ),
            "shuffle": (shuffle, shuffled_by_keras(x) if shuffle else None),
        }
        seeds = begin(self.whole.everyone, self._comm, self._subject, facts, problem)
        if shuffle:
            x = shuffled_alike(self._comm, x, seeds)
        callbacks = led(callbacks, self, self.whole.everyone)
        history = super().fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=self._verbose(verbose),
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle and not isinstance(x, ShuffledAlike),
            **options,
        )
        # A rank whose script ends here ends the engine, perhaps in the middle of another pipeline's last
        # exchange.
        self.whole.wait_for_all()
        return history

    def evaluate(self, x=None, y=None, batch_size=None, verbose="auto", **options):
        """As `keras.Model.evaluate`; batches may have any number of rows.

        Raises:
            ValueError: as `fit`.
            tf.errors.InvalidArgumentError: as `fit`.
        """
        self._assert_compile_called("evaluate")
        if not options.get("_use_cached_eval_dataset"):
            problem = self._callbacks_problem(options.get("callbacks"))
            try:
                x, y = self._complete(x, y)
            except ValueError as error:
                problem = problem or str(error)
            begin(self._comm, self._comm, self._subject, settings_of(self), problem)
        return super().evaluate(x, y, batch_size=batch_size, verbose=self._verbose(verbose), **options)

    def predict(self, x, batch_size=None, verbose="auto", **options):
        """As `keras.Model.predict`: all ranks get all predictions.

        Of `x` the first stage takes the values; elsewhere the numbers of rows must be the same.
        """
        return super().predict(x, batch_size=batch_size, verbose=self._verbose(verbose), **options)

    def call(self, inputs, training=None):
        """The whole model's outputs, by a forward pass through all ranks, which must call it together.

        Raises:
            ValueError: with `training=True`: gradients go through the ranks in `fit` only.
        """
        if training:
            raise ValueError("`training` must be False: a pipeline trains in `fit`. Received: training=True.")
        return self.predict_step((inputs,))

    def save(self, filepath: str | os.PathLike, overwrite: bool = True, **options) -> None:
        """Writes the whole model, with the optimizer's state, as one file that opens in plain Keras.

        Every rank calls it; the first one gathers the weights, which takes as much memory as the whole model
        and its optimizer, and writes. Callbacks such as `keras.callbacks.ModelCheckpoint` do so on all ranks.

        Raises:
            OSError: on every rank alike, if the file cannot be written.
            ValueError: on every rank alike, if Keras does not take an argument.
            RuntimeError: within AsOneProcess, where one rank would wait for the others.
        """
        check_all_call(self.whole.everyone)
        self.whole.save(filepath, self, overwrite=overwrite, **options)

    def save_weights(self, filepath: str | os.PathLike, overwrite: bool = True, **options) -> None:
        """Writes the whole model's weights and, once there is one, the optimizer's state, as Keras does.

        As `save` otherwise.
        """
        check_all_call(self.whole.everyone)
        self.whole.save_weights(filepath, self, overwrite=overwrite, **options)

    def load_weights(self, filepath: str | os.PathLike, **options) -> None:
        """Reads this rank's weights from a file with the whole model's (`.keras` or `.weights.h5`).

        Every rank calls it. As in Keras, the state of a built optimizer is read, too, if the file has it.

        Raises:
            OSError: on every rank alike, if a rank cannot read the file.
            ValueError: on every rank alike, if it is of another kind, or of another model.
            RuntimeError: as `save`.
        """
        check_all_call(self.whole.everyone)
        has_state = self.compiled and self.optimizer is not None and self.optimizer.built
        self.whole.load_weights(filepath, self.optimizer if has_state else None, **options)

    def load_checkpoint(self, filepath: str | os.PathLike) -> None:
        """Reads this rank's weights and optimizer state from a file of the whole model.

        `save`, `save_weights` or plain Keras has written it. Every rank calls it. The model must be compiled,
        with an optimizer of the same kind.

        Raises:
            OSError: on every rank alike, if a rank cannot read the file.
            ValueError: if the model is not compiled; on every rank alike, if the file is of another kind or
                of another model, or holds no such optimizer's state.
            RuntimeError: as `save`.
        """
        check_all_call(self.whole.everyone)
        self._assert_compile_called("load_checkpoint")
        self._build_optimizer()
        self.whole.load_checkpoint(filepath, self.optimizer)

    # -- one batch ---------------------------------------------------------------------------------------

    def train_step(self, data):
        """One update, of which Keras makes its training function: called by all ranks for the same batch."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        rows = rows_of(x)
        whole_batch = self._checked_rows(rows, keras.tree.flatten(x)[0].shape[0])
        with tf.control_dependencies([whole_batch]):
            x, y, sample_weight = keras.tree.map_structure(_identity, (x, y, sample_weight))
        inputs = self._cut(self._inputs_of(x)) if self._is_first else []
        targets = self._cut(y) if self._is_last else []
        weights = self._cut(sample_weight) if self._is_last else []
        shares = self._shares(sample_weight, weights)
        losses: list[tf.Tensor] = []

        def objective(k, outputs, additional):
            terms = [self._aggregate_additional_loss(loss) / self.microbatches for loss in additional]
            if outputs is not None:
                loss = self._loss_of(targets[k], self._packed(outputs), weights[k])
                terms.append(loss * tf.cast(shares[k], loss.dtype))
            if not terms:
                return None
            total = tf.add_n(terms)
            losses.append(total)
            return self.optimizer.scale_loss(total)

        outputs, by_variable, transfers = self._runner.train(
            self._settings.training, inputs, whole_batch, objective
        )
        if self._is_last:
            self._update_metrics(y, self._joined(outputs), sample_weight)
        variables, gradients = self._gradients(by_variable)
        overflow = self._count_overflow(gradients)
        loss, overflows = self._share(losses, overflow, marks_of(x, y, whole_batch), transfers)
        with tf.control_dependencies([loss]):  # which fails if the ranks' batches differ
            gradients = [map_gradient(tf.identity, gradient) for gradient in gradients]
        if overflow is not None:
            poison = tf.where(overflows > 0, float("nan"), 0.0)
            first = next(i for i, gradient in enumerate(gradients) if gradient is not None)
            gradients[first] = map_gradient(lambda g: g + tf.cast(poison, g.dtype), gradients[first])
        self._loss_tracker.update_state(loss, sample_weight=rows)
        # Backward: the last layer's gradient is complete first.
        self.optimizer.apply_gradients(zip(gradients[::-1], variables[::-1], strict=True))
        return self.get_metrics_result()

    def test_step(self, data):
        """Loss and metrics of one batch, called by all ranks for the same one."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        rows = rows_of(x)
        losses: list[tf.Tensor] = []

        def take(additional):
            losses.extend(self._aggregate_additional_loss(loss) / self.microbatches for loss in additional)

        outputs, transfers = self._forward(x, rows, take)
        if self._is_last:
            y_pred = self._joined(outputs, rows)
            losses.append(self._loss_of(y, y_pred, sample_weight))
            self._update_metrics(y, y_pred, sample_weight)
        loss, _ = self._share(losses, None, marks_of(x, y, rows), transfers)
        self._loss_tracker.update_state(loss, sample_weight=rows)
        return self.get_metrics_result()

    def predict_step(self, data):
        """Predictions for one batch, on all ranks, which call it together."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        rows = rows_of(x)
        outputs, _ = self._forward(x, rows, lambda losses: None)
        specs = [Spec(tuple(t.shape), tf.as_dtype(t.dtype)) for t in self._function.outputs]
        message = tf.zeros([0], tf.uint8)
        if self._is_last:
            message = pack(keras.tree.flatten(self._joined(outputs, rows)), specs)
        if self._comm.size > 1:
            with tf.control_dependencies([rows]):
                message = tf.identity(message)
            message = self._comm.allgather(message, f"hvdext.pipeline.{self._runner.name}.predictions")
        return _without_list_of_one(
            keras.tree.pack_sequence_as(self._function._outputs_struct, unpack(message, specs))
        )

    def _forward(self, x, rows, take_losses):
        """As `Runner.forward`. What the last micro-batch lacks is filled up with the batch's last row."""
        inputs = []
        if self._is_first:
            padded = -(-rows // self.microbatches) * self.microbatches
            chosen = tf.minimum(tf.range(padded), rows - 1)
            inputs = self._cut([tf.gather(tensor, chosen) for tensor in self._inputs_of(x)])
        return self._runner.forward(self._settings.inference, inputs, rows, take_losses)

    # -- data ----------------------------------------------------------------------------------------------

    @property
    def _subject(self) -> str:
        return f"the pipeline of model {self.name!r}"

    def _callbacks_problem(self, callbacks) -> str | None:
        return callbacks_problem(callbacks) if self.whole.everyone.size > 1 else None

    def _complete(self, x, y):
        return complete(x, y, needs_x=self._is_first, needs_y=self._is_last, rank=self._comm.rank)

    @property
    def _function(self) -> keras.Function:
        """The whole model's graph."""
        function = function_of(self.whole.model)
        assert function is not None, "calls_of refuses such a model"
        return function

    def _inputs_of(self, x) -> list[tf.Tensor]:
        return self._function._standardize_inputs(x)

    def _cut(self, structure) -> list:
        """A structure for each micro-batch, all with equally many rows."""
        if structure is None:
            return [None] * self.microbatches
        flat = [tf.split(tensor, self.microbatches) for tensor in keras.tree.flatten(structure)]
        return [
            keras.tree.pack_sequence_as(structure, [parts[k] for parts in flat])
            for k in range(self.microbatches)
        ]

    def _checked_rows(self, rows, static_rows) -> tf.Tensor:
        """`rows`, once it is known that the micro-batches are equally large."""
        problem = microbatch_problem(self.microbatches, static_rows, static_rows) if static_rows else None
        if problem is not None:
            raise ValueError(problem)
        message = (
            "`microbatches` must divide the number of rows of each batch. "
            f"Received: microbatches={self.microbatches} and a batch of so many rows:"
        )
        check = tf.debugging.Assert(tf.equal(rows % self.microbatches, 0), [message, rows])
        with tf.control_dependencies([] if check is None else [check]):
            return tf.identity(rows)

    def _shares(self, sample_weight, weights) -> list:
        """What each micro-batch's loss counts for.

        Means over samples have 1/m each and sums 1. A mean that divides by the sum of its weights counts by
        them.
        """
        if not self._is_last:
            return []
        losses = [entry.loss for entry in self._compile_loss._flat_losses]
        kinds = {getattr(loss, "reduction", "sum_over_batch_size") for loss in losses}
        sums = [kind for kind in kinds if kind == "sum"]
        if sums and len(kinds) > 1:
            raise ValueError(
                "`loss` must have one kind of reduction for all outputs of a pipeline. "
                f"Received: {sorted(kinds)}."
            )
        if sums:
            return [1.0] * self.microbatches
        if "mean_with_sample_weight" in kinds and sample_weight is not None:
            if keras.tree.is_nested(sample_weight) or len(kinds) > 1:
                raise ValueError(
                    "`sample_weight` must be one array, and the reduction that of all outputs, with "
                    f"reduction='mean_with_sample_weight'. Received: reductions {sorted(kinds)}."
                )
            total = tf.reduce_sum(tf.cast(sample_weight, tf.float32))
            return [tf.math.divide_no_nan(tf.reduce_sum(tf.cast(w, tf.float32)), total) for w in weights]
        return [1 / self.microbatches] * self.microbatches

    def _packed(self, given: list):
        """The model's outputs in their structure, with their masks, of what the last chunk gives."""
        parcels = self._runner.stages[self._runner.last].chunk.gives
        by_name = {p.name: tensor for p, tensor in zip(parcels, given, strict=True) if not p.is_mask}
        for parcel, tensor in zip(parcels, given, strict=True):
            if parcel.is_mask:
                by_name[parcel.name]._keras_mask = tensor
        flat = [by_name[name] for name in self.whole.calls.outputs]
        return _without_list_of_one(keras.tree.pack_sequence_as(self._function._outputs_struct, flat))

    def _joined(self, outputs: list[list], rows=None):
        """The outputs of all micro-batches as those of one batch, its first `rows` rows."""
        parts = [tf.concat(column, 0) for column in zip(*outputs, strict=True)]
        return self._packed(parts if rows is None else [part[:rows] for part in parts])

    # -- what the stages tell each other after a batch -----------------------------------------------------

    def _loss_of(self, y, y_pred, sample_weight):
        return self._compile_loss(with_rows_of(y, y_pred), y_pred, with_rows_of(sample_weight, y_pred))

    def _update_metrics(self, y, y_pred, sample_weight):
        if self._compile_metrics is not None:
            y, sample_weight = with_rows_of(y, y_pred), with_rows_of(sample_weight, y_pred)
            self._compile_metrics.update_state(y, y_pred, sample_weight)

    def _metric_variables(self) -> list:
        metrics = [*self._compile_loss.metrics, *([self._compile_metrics] if self._compile_metrics else [])]
        return [variable for metric in metrics for variable in metric.variables]

    def _share(self, losses: list, overflow, marks, transfers: list) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums losses and overflows over the stages; the last rank's metrics become everybody's.

        Called by all ranks once per batch.

        Args:
            losses: of this rank's stages.
            overflow: 1 if its gradients have overflowed, or None.
            marks: of its batch, from `marks_of`; nothing is told before they are there.
            transfers: of its other messages. They end before the marks are compared: a rank that fails
                between two messages would leave its neighbours waiting.

        Returns:
            The batch's loss and the number of stages whose gradients have overflowed.
        """
        # float64 holds every metric's float32 and count exactly.
        loss = (
            tf.add_n([tf.cast(value, tf.float64) for value in losses]) if losses else tf.zeros([], tf.float64)
        )
        overflow = tf.zeros([], tf.float64) if overflow is None else tf.cast(overflow, tf.float64)
        variables = self._metric_variables()
        states = [tf.reshape(tf.cast(v.value, tf.float64), [-1]) for v in variables]
        if not self._is_last:
            states = [tf.zeros_like(state) for state in states]
        ranks = self._comm.size
        my_marks = tf.reshape(tf.one_hot(self._comm.rank, ranks, dtype=tf.float64)[:, None] * marks, [-1])
        mine = tf.concat([tf.stack([loss, overflow]), my_marks, *states], 0)
        (total,) = self._comm.allreduce([mine], f"hvdext.pipeline.{self._runner.name}.results")
        sums, all_marks, values = tf.split(total, [2, ranks * COUNT, -1])
        if variables and not self._is_last:
            parts = tf.split(values, [math.prod(v.shape) for v in variables])
            for variable, part in zip(variables, parts, strict=True):
                variable.assign(tf.reshape(tf.cast(part, variable.dtype), variable.shape))
        with tf.control_dependencies(transfers):
            checks = checks_of(tf.reshape(all_marks, [ranks, COUNT]))
        with tf.control_dependencies(checks):
            return tf.identity(tf.cast(sums[0], keras.config.floatx())), sums[1]

    def _gradients(self, by_variable: dict) -> tuple[list, list]:
        """What the optimizer applies. A stage that trains nothing has a number to train that nobody uses."""
        variables = self.trainable_variables
        if variables:
            return variables, [by_variable.get(id(v)) for v in variables]
        stand_in = self._stand_in.variable
        return [stand_in], [tf.zeros([], stand_in.dtype)]

    def _count_overflow(self, gradients) -> tf.Tensor | None:
        """1 if a gradient of this rank is not finite; None if nobody asks."""
        if not isinstance(self.optimizer, LossScaleOptimizer):
            return None
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None]
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])
        return 1.0 - tf.cast(finite, tf.float32)

    def _clip_over_stages(self, optimizer) -> None:
        """Makes `global_clipnorm` mean the norm over all stages."""
        members = [optimizer, *getattr(optimizer, "optimizers", [])]
        if self._comm.size == 1 or not any(member.global_clipnorm for member in members):
            return
        hook = hook_of(optimizer)
        if len(members) > 1 or (hook is not None and hook.has_keras_accumulation):
            raise ValueError(
                "`global_clipnorm` must be None for a pipeline with a MultiOptimizer, or with a "
                "DistributedOptimizer that has gradient_accumulation_steps. "
                f"Received: global_clipnorm={[member.global_clipnorm for member in members]}."
            )
        comm, name = self._comm, f"hvdext.pipeline.{self._runner.name}.norm"

        def clip(gradients):
            mine = tf.add_n([squared_norm(g) for g in gradients if g is not None])
            (total,) = comm.allreduce([mine], name)
            norm = tf.sqrt(total)
            limit = optimizer.global_clipnorm
            # As Keras does it: not a number for a norm that is not finite.
            scale = limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)
            return [map_gradient(lambda g: g * tf.cast(scale, g.dtype), g) for g in gradients]

        optimizer._clip_gradients = clip

    # -- before the first batch ------------------------------------------------------------------------------

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Called by Keras before training and evaluation, on all ranks."""
        if iterator is not None:
            check_number_of_batches(self._comm, iterator.num_batches)
        if self._is_prepared:  # later batches are compared as they come
            return
        if data_batch is None:
            data_batch = first_batch(iterator)
        self._prepare(*keras.utils.unpack_x_y_sample_weight(data_batch))
        self._is_prepared = True

    def _prepare(self, x, y, sample_weight) -> None:
        """Compares settings and first batches; builds metrics and optimizer, also where they are idle."""
        facts = settings_of(self) | {"rows of the first batch": keras.tree.flatten(x)[0].shape[0]}
        agreement.check(self._comm, self._subject, facts)
        seen = {"x": digest(x), "y": digest(y)}
        structure = keras.tree.map_structure(
            lambda t: None if t is None else _Leaf(tuple(t.shape[1:]), t.dtype.name), (y, sample_weight)
        )
        everyone = self._comm.allgather_object((seen, structure), "hvdext.placement.batch")
        for what in seen:
            differ = {s[what] for s, _ in everyone if s[what] is not None}
            if len(differ) > 1:
                raise ValueError(
                    f"`{what}` must have the same batches in the same order on all ranks of a pipeline that "
                    "are given one: shuffle with the same seed on all. "
                    f"Received: first batches that differ, by rank: {[s[what] for s, _ in everyone]}."
                )
        y, sample_weight = everyone[self._runner.last % self._comm.size][1]
        if y is None:
            raise ValueError("`y` must be given on the rank of the last stage. Received: y=None.")
        self._build_metrics(*(keras.tree.map_structure(_symbolic, part) for part in (y, sample_weight)))
        self._build_optimizer()

    def _build_metrics(self, y, sample_weight):
        outputs = [keras.KerasTensor((None, *t.shape[1:]), t.dtype) for t in self._function.outputs]
        y_pred = _without_list_of_one(keras.tree.pack_sequence_as(self._function._outputs_struct, outputs))
        backend.compute_output_spec(self.compute_metrics, None, y, y_pred, sample_weight=sample_weight)
        backend.compute_output_spec(self._compile_loss, y, y_pred, sample_weight)

    def _build_optimizer(self):
        if not self.trainable_variables:  # of which Keras takes as many averages as the optimizer keeps
            innermost(self.optimizer).finalize_variable_values = lambda trained: None
        build(self.optimizer, self.trainable_variables or [self._stand_in.variable])

    def _verbose(self, verbose):
        return 0 if verbose == "auto" and not self._is_first else verbose


class _StandIn:
    """Trained by a stage without trained weights, whose optimizer counts along; no weight of the model."""

    @functools.cached_property
    def variable(self) -> keras.Variable:
        return keras.Variable(np.zeros((), "float32"), name="nothing_to_train")


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a batch but for its rows."""

    shape: tuple
    dtype: str


def _symbolic(leaf):
    return None if leaf is None else keras.KerasTensor((None, *leaf.shape), leaf.dtype)


def _identity(tensor):
    return None if tensor is None else tf.identity(tensor)


def _without_list_of_one(outputs):
    """As a functional model returns them."""
    is_one = isinstance(outputs, (list, tuple)) and len(outputs) == 1
    return outputs[0] if is_one else outputs
