"""`PipelineModel`: one rank's stages of a model, trained, evaluated and asked as a Keras model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

from hvdext.gradients.tensors import map_gradient, poisoned
from hvdext.keras_tools import training
from hvdext.keras_tools.functional import outputs_like, required_function_of, standardized
from hvdext.keras_tools.layers import set_mask
from hvdext.keras_tools.optimizers import innermost, updaters_of
from hvdext.placement.pipeline import results
from hvdext.placement.pipeline.backup import with_leader
from hvdext.placement.pipeline.batch_check import marks_of
from hvdext.placement.pipeline.clipping import clip_over_stages, count_overflow
from hvdext.placement.pipeline.data import (
    checked_rows,
    complete,
    parts_of,
    require_whole_microbatches,
    rows_of,
)
from hvdext.placement.pipeline.files import Files
from hvdext.placement.pipeline.first_batch import FirstBatch
from hvdext.placement.pipeline.preflight import (
    ShuffledAlike,
    begin,
    callbacks_problem,
    facts_of_fit,
    settings_of,
    shuffled_alike,
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


class PipelineModel(Files, keras.Model):
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

    makes_losses_in_parts = True  # asked by the exchange of gradients: one for each micro-batch

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
        last = runner.last % whole.comm.size
        self._is_first = whole.comm.rank == 0
        self._is_last = whole.comm.rank == last
        self._results = results.Results(whole.comm, runner.name, self._is_last)
        self._first_batch = FirstBatch(whole.comm, self._subject, self._function, last)
        self._is_fitting = False
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
        self._first_batch.forget()
        if self.optimizer is not None:
            target = innermost(self.optimizer)
            clip_over_stages(target, self._comm, self._runner.name)
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
        class_weight=None,
        sample_weight=None,
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
        training.require_compiled(self, "fit")
        problem = self.whole.change_in(self) or self._callbacks_problem(callbacks)
        steps = options.get("steps_per_epoch")
        try:
            x, y = self._complete(x, y)
            if isinstance(validation_data, (tuple, list)):
                others = validation_data[2:] if self._is_last else ()
                validation_data = (*self._complete(*validation_data[:2]), *others)
            if steps is None:
                part = 0 if validation_data else validation_split
                require_whole_microbatches(self.microbatches, x, part, batch_size)
        except ValueError as error:
            problem = problem or str(error)
        has_validation = validation_data is not None or validation_split
        facts = facts_of_fit(self, x, callbacks, epochs, shuffle, has_validation, options)
        seeds = begin(self.whole.everyone, self._comm, self._subject, facts, problem)
        if shuffle:
            x = shuffled_alike(self._comm, x, seeds)
            shuffle = not isinstance(x, ShuffledAlike)
        sample_weight, class_weight = self._here(sample_weight, class_weight)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = training.split((x, y, sample_weight), validation_split)
        data = {"sample_weight": sample_weight, "batch_size": batch_size, "class_weight": class_weight}
        x = self._first_batch.of_epoch(self, x, y, steps, **data)
        if validation_data is not None:
            self._first_batch.of_validation(validation_data, batch_size, options)
        self._is_fitting = True
        try:
            history = super().fit(
                x,
                y,
                epochs=epochs,
                verbose=self._verbose(verbose),
                callbacks=with_leader(callbacks, self, self.whole.everyone),
                validation_data=validation_data,
                shuffle=shuffle,
                **data,
                **options,
            )
        finally:
            self._is_fitting = False
        # A rank whose script ends here ends the engine, perhaps in the middle of another pipeline's last
        # exchange.
        self.whole.wait_for_all()
        return history

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        **options,
    ):
        """As `keras.Model.evaluate`; batches may have any number of rows.

        Raises:
            ValueError: as `fit`.
            tf.errors.InvalidArgumentError: as `fit`.
        """
        training.require_compiled(self, "evaluate")
        (sample_weight,) = self._here(sample_weight)
        data = {"sample_weight": sample_weight, "batch_size": batch_size}
        # Keras validates within `fit`, which has compared the data; a callback may evaluate others there.
        is_validation = self._is_fitting and isinstance(
            options.get("callbacks"), keras.callbacks.CallbackList
        )
        if not is_validation:
            problem = self.whole.change_in(self) or self._callbacks_problem(options.get("callbacks"))
            try:
                x, y = self._complete(x, y)
            except ValueError as error:
                problem = problem or str(error)
            begin(self._comm, self._comm, self._subject, settings_of(self), problem)
            x = self._first_batch.of_epoch(self, x, y, steps, **data)
        return super().evaluate(x, y, verbose=self._verbose(verbose), steps=steps, **data, **options)

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """As `keras.Model.train_on_batch`, called by all ranks for the same batch.

        Raises:
            ValueError: as `fit`, before the first batch.
            tf.errors.InvalidArgumentError: as `fit`.
        """
        training.require_compiled(self, "train_on_batch")
        x, y, problem = self._completed(x, y)
        sample_weight, class_weight = self._here(sample_weight, class_weight)
        seen = None if problem else (x, y, training.weights_of(y, sample_weight, class_weight))
        self._first_batch.compare(self, seen, problem)
        return super().train_on_batch(x, y, sample_weight, class_weight, return_dict)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        """As `keras.Model.test_on_batch`, called by all ranks for the same batch.

        Raises:
            ValueError: as `fit`, before the first batch.
            tf.errors.InvalidArgumentError: as `fit`.
        """
        training.require_compiled(self, "test_on_batch")
        x, y, problem = self._completed(x, y)
        (sample_weight,) = self._here(sample_weight)
        self._first_batch.compare(self, (x, y, sample_weight), problem)
        return super().test_on_batch(x, y, sample_weight, return_dict)

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

    # -- one batch ---------------------------------------------------------------------------------------

    def train_step(self, data):
        """One update, of which Keras makes its training function: called by all ranks for the same batch."""
        self._first_batch.require_compared()
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        rows = rows_of(x)
        whole_batch = checked_rows(self.microbatches, rows, keras.tree.flatten(x)[0].shape[0])
        with tf.control_dependencies([whole_batch]):
            x, y, sample_weight = _identities((x, y, sample_weight))
        inputs = parts_of(self._inputs_of(x), self.microbatches) if self._is_first else []
        targets = parts_of(y, self.microbatches) if self._is_last else []
        weights = parts_of(sample_weight, self.microbatches) if self._is_last else []
        counts = results.shares(self, sample_weight, weights) if self._is_last else []
        losses: list[tf.Tensor] = []

        def objective(k, outputs, additional):
            terms = [training.additional_loss(self, loss) / self.microbatches for loss in additional]
            if outputs is not None:
                loss = results.loss_of(self, targets[k], self._packed(outputs), weights[k])
                terms.append(loss * tf.cast(counts[k], loss.dtype))
            if not terms:
                return None
            total = tf.add_n(terms)
            losses.append(total)
            return self.optimizer.scale_loss(total)

        outputs, by_variable, transfers = self._runner.train(
            self._settings.training, inputs, whole_batch, objective
        )
        if self._is_last:
            results.update_metrics(self, y, self._joined(outputs), sample_weight)
        variables, gradients = self._gradients(by_variable)
        overflow = count_overflow(self.optimizer, gradients)
        loss, overflows = self._share(losses, overflow, marks_of(x, y, whole_batch), transfers)
        with tf.control_dependencies([loss]):  # which fails if the ranks' batches differ
            gradients = [map_gradient(tf.identity, gradient) for gradient in gradients]
        if overflow is not None:
            gradients = poisoned(gradients, unless=tf.equal(overflows, 0))
        results.track_loss(self, loss, rows)
        # Backward: the last layer's gradient is complete first.
        self.optimizer.apply_gradients(zip(gradients[::-1], variables[::-1], strict=True))
        return self.get_metrics_result()

    def test_step(self, data):
        """Loss and metrics of one batch, called by all ranks for the same one."""
        self._first_batch.require_compared()
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        rows = rows_of(x)
        losses: list[tf.Tensor] = []

        def take(additional):
            losses.extend(training.additional_loss(self, loss) / self.microbatches for loss in additional)

        outputs, transfers = self._forward(x, rows, take)
        if self._is_last:
            y_pred = self._joined(outputs, rows)
            losses.append(results.loss_of(self, y, y_pred, sample_weight))
            results.update_metrics(self, y, y_pred, sample_weight)
        loss, _ = self._share(losses, None, marks_of(x, y, rows), transfers)
        results.track_loss(self, loss, rows)
        return self.get_metrics_result()

    def predict_step(self, data):
        """Predictions for one batch, on all ranks, which call it together."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        rows = rows_of(x)
        outputs, _ = self._forward(x, rows, lambda losses: None)
        flat = keras.tree.flatten(self._joined(outputs, rows)) if self._is_last else []
        return self._results.spread(self._function, flat, rows)

    def _forward(self, x, rows, take_losses):
        """As `Runner.forward`. What the last micro-batch lacks is filled up with the batch's last row."""
        inputs = []
        if self._is_first:
            padded = -(-rows // self.microbatches) * self.microbatches
            chosen = tf.minimum(tf.range(padded), rows - 1)
            padded_inputs = [tf.gather(tensor, chosen) for tensor in self._inputs_of(x)]
            inputs = parts_of(padded_inputs, self.microbatches)
        return self._runner.forward(self._settings.inference, inputs, rows, take_losses)

    # -- data ----------------------------------------------------------------------------------------------

    @property
    def _subject(self) -> str:
        return f"the pipeline of model {self.name!r}"

    def _callbacks_problem(self, callbacks) -> str | None:
        return callbacks_problem(callbacks) if self.whole.everyone.size > 1 else None

    def _complete(self, x, y):
        return complete(x, y, needs_x=self._is_first, needs_y=self._is_last, rank=self._comm.rank)

    def _completed(self, x, y):
        """As `_complete`, and what is wrong with them, for all to hear, or None."""
        try:
            return *self._complete(x, y), None
        except ValueError as error:
            return x, y, str(error)

    def _here(self, *weights) -> tuple:
        """Weights of samples, of use where the last stage is: elsewhere there may be no targets for them."""
        return weights if self._is_last else tuple(None for _ in weights)

    @property
    def _function(self) -> keras.Function:
        """The whole model's graph."""
        return required_function_of(self.whole.model)

    def _inputs_of(self, x) -> list[tf.Tensor]:
        return standardized(self._function, x)

    def _packed(self, given: list):
        """The model's outputs in their structure, with their masks, of what the last chunk gives."""
        parcels = self._runner.stages[self._runner.last].chunk.gives
        by_name = {p.name: tensor for p, tensor in zip(parcels, given, strict=True) if not p.is_mask}
        for parcel, tensor in zip(parcels, given, strict=True):
            if parcel.is_mask:
                set_mask(by_name[parcel.name], tensor)
        flat = [by_name[name] for name in self.whole.calls.outputs]
        return outputs_like(self._function, flat)

    def _joined(self, outputs: list[list], rows=None):
        """The outputs of all micro-batches as those of one batch, its first `rows` rows."""
        parts = [tf.concat(column, 0) for column in zip(*outputs, strict=True)]
        return self._packed(parts if rows is None else [part[:rows] for part in parts])

    def _share(self, losses, overflow, marks, transfers):
        return self._results.share(results.metric_variables(self), losses, overflow, marks, transfers)

    def _gradients(self, by_variable: dict) -> tuple[list, list]:
        """What the optimizer applies. A stage that trains nothing has a number to train that nobody uses."""
        variables = self.trainable_variables
        if variables:
            return variables, [by_variable.get(id(v)) for v in variables]
        stand_in = self._first_batch.stand_in
        return [stand_in], [tf.zeros([], stand_in.dtype)]

    def _verbose(self, verbose):
        return 0 if verbose == "auto" and not self._is_first else verbose


def _identities(structure):
    return keras.tree.map_structure(tf.identity, structure, none_is_leaf=False)
