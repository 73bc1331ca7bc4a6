"""`DistributedOptimizer`: a Keras 3 optimizer whose gradients are combined over the ranks.

Keras calls `optimizer.apply(gradients, variables)` in `model.fit`, `train_on_batch` and custom loops alike.
`DistributedOptimizer` puts a hook in front of that one method of the optimizer it is given, and leaves
the optimizer what it is: a model saved with it names the plain Keras class and holds its state, and opens
where hvdext is not installed.

    loss scale removed -> accumulated over micro-batches -> combined over ranks -> Keras' own apply:
    clipped, decayed, applied, averaged (EMA)
"""

from __future__ import annotations

from collections.abc import Sequence

import keras

from hvdext.collectives.compression import Compression
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_whole
from hvdext.gradients.accumulation import Accumulator
from hvdext.gradients.apply_hook import ApplyHook, check_members, hook_of
from hvdext.gradients.batches import told_of_batches
from hvdext.gradients.compiling import compiled_in_parts, is_in_parts
from hvdext.gradients.exchange import GradientExchange
from hvdext.gradients.options import ExchangeOptions, old_groups
from hvdext.gradients.train_step import WeightBy
from hvdext.gradients.training import told_by_fit
from hvdext.gradients.weighing import Weighing, warn_of_masks
from hvdext.keras_tools.every_fit import follow_every_fit
from hvdext.keras_tools.every_train_step import surround_every_train_step
from hvdext.keras_tools.lookups import note_sparse_lookups
from hvdext.keras_tools.loss_reduction import listen_to_losses
from hvdext.keras_tools.optimizers import innermost
from hvdext.keras_tools.selection import Select


@suggests_keywords
def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer | str,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Compression = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: ReduceOp = ReduceOp.AVERAGE,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Sequence[Sequence] | None = None,
    process_set: ProcessSet | None = None,
    scale_local_gradients: bool = True,
    *,
    select: Select = None,
    uneven_batches: bool = False,
    weight_by: WeightBy = None,
) -> keras.optimizers.Optimizer:
    """Makes `optimizer` combine its gradients over the ranks before it applies them.

    The same object comes back, with its class, variables and settings. N ranks with batch size B then
    train as one process with batch size N*B (op=Average), for every optimizer of Keras 3.

    Args:
        optimizer: a Keras 3 optimizer, or the name of one. A `LossScaleOptimizer` or `MultiOptimizer` is
            fine; under the policy `mixed_float16` Keras wraps the optimizer by itself, and all ranks skip a
            step together when any one of them overflows.
        name: part of the collectives' names; default: the optimizer's own name.
        device_dense: device for the exchange of dense gradients, such as "/cpu:0"; "": where they are.
        device_sparse: the same for sparse gradients.
        compression: `hvd.Compression.none` or `hvd.Compression.fp16`.
        sparse_as_dense: sum sparse gradients as dense tensors instead of gathering their slices. Less
            to send where most rows are touched; optimizers that are not linear in repeated rows then
            differ from one process with the whole batch.
        gradient_predivide_factor: with op=Average, gradients are divided by it before the sum and
            multiplied by `factor / size` after it.
        op: `hvd.Average`, `hvd.Sum` or `hvd.Adasum` (dense gradients, power-of-two ranks).
        backward_passes_per_step: micro-batches whose gradients are added up locally before one exchange
            and one update, at least 1. `iterations`, schedules, EMA and weight decay advance once per
            update.
        average_aggregated_gradients: divide what was added up by `backward_passes_per_step`.
        num_groups: Horovod's old name for a number in `groups`; 0: unset.
        groups: number of buckets for the dense gradients, or lists of variables that travel together;
            None: by bytes, in the order in which backward produces them.
        process_set: a `hvd.ProcessSet` this rank belongs to; None: all ranks.
        scale_local_gradients: divide gradients that stay local by the number of ranks (Horovod's rule:
            it makes the update equal that of one process whose loss is the mean over the ranks).
        select: which variables are exchanged: a pattern on variable paths such as `"*/kernel"`, a list
            of patterns, or a function of a variable. The others stay local, as do those given to
            `optimizer.register_local_var(variable)`. None: all.
        uneven_batches: for custom loops in which a rank may run out of batches before the others: it then
            calls `hvd.join(optimizer)`. In `model.fit` the callback `hvd.callbacks.UnevenBatches` does both.
        weight_by: what a rank's gradients count for, in `model.fit` and `train_on_batch`. None: losses of
            Keras that divide by a mask, by weights or by nothing divide by all ranks' as one process would,
            and batches are of one size. "samples": gradients are weighed by the rows of the rank's batch,
            too: for ranks with different batch sizes. A function of (x, y, sample_weight), the last two
            perhaps None, returns a scalar: what the loss of this rank's batch is divided by.

    Returns:
        `optimizer`; of a name, the optimizer that Keras makes of it.

    Raises:
        TypeError, ValueError: if an argument breaks its rule; the message names argument, rule and the
            value received. At the first step, on every rank alike: if the ranks' models or settings
            differ, a pattern matches nothing or this rank is not in `process_set`.
        RuntimeError: at the first step, if `hvd.init()` has not been called, or the optimizer is applied in
            a function of your own that XLA compiles.
    """
    optimizer = _named(optimizer) if isinstance(optimizer, str) else optimizer
    _check_optimizer(optimizer)
    passes = require_whole("backward_passes_per_step", backward_passes_per_step, 1)
    options = ExchangeOptions.from_arguments(locals(), groups=old_groups(num_groups, groups))
    target = innermost(optimizer)
    _check_accumulates_once(target, passes)
    check_members(target)
    exchange = GradientExchange(name or target.name, options, is_numbered=name is None)
    accumulator = Accumulator(passes, average_aggregated_gradients) if passes > 1 else None
    hook = ApplyHook(target, exchange, accumulator, Weighing(exchange, weight_by))
    hook.expect_uneven_batches(uneven_batches)
    hook.put_into(optimizer)
    follow_every_fit(told_by_fit)
    surround_every_train_step(compiled_in_parts, compiles=is_in_parts)
    surround_every_train_step(told_of_batches)
    listen_to_losses(warn_of_masks)
    note_sparse_lookups()
    return optimizer


# -- helpers ------------------------------------------------------------------------------------------


def _named(name):
    try:
        return keras.optimizers.get(name)
    except ValueError as error:
        raise ValueError(
            f"`optimizer` must be a Keras 3 optimizer, or the name of one. Received: optimizer={name!r}."
        ) from error


def _check_optimizer(optimizer):
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a Keras 3 optimizer, such as keras.optimizers.Adam(). "
            f"Received: {optimizer!r} of type {type(optimizer).__module__}.{type(optimizer).__name__}."
        )
    if hook_of(optimizer) is not None:
        raise ValueError(
            "`optimizer` must not be distributed already: its gradients would be combined twice. "
            f"Received: {optimizer.name!r}, which hvd.DistributedOptimizer has been given before."
        )


def _check_accumulates_once(target, passes):
    if passes > 1 and target.gradient_accumulation_steps:
        raise ValueError(
            "`backward_passes_per_step` must be 1 for an optimizer that accumulates by itself. Received: "
            f"backward_passes_per_step={passes} and an optimizer with "
            f"gradient_accumulation_steps={target.gradient_accumulation_steps}."
        )
