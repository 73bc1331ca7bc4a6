"""The hook in front of one optimizer's `apply`: whether gradients are kept, combined, applied.

loss scale removed -> accumulated over micro-batches -> combined over ranks -> Keras' own apply:
clipped, decayed, applied, averaged (EMA)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import keras
import tensorflow as tf
from keras.optimizers import LossScaleOptimizer

from hvdext.comm.guards import guards_of
from hvdext.comm.ledger import Ledger
from hvdext.common.log import warn
from hvdext.gradients.accumulation import Accumulator
from hvdext.gradients.checks import check_clipping, check_keras_accumulation
from hvdext.gradients.compiled_parts import Update, put_off
from hvdext.gradients.exchange import GradientExchange
from hvdext.gradients.guard import Guard
from hvdext.gradients.keras_apply import put_before
from hvdext.gradients.local_part import local_on_any, placed, shared_of
from hvdext.gradients.sums import marked
from hvdext.gradients.tensors import all_finite, as_tensors, is_overwritten, poisoned, times, values_of
from hvdext.gradients.uneven import RollCall, common_kinds, empty_gradients, kinds_of
from hvdext.gradients.weighing import Weighing, weighed
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.numbering import renumbered
from hvdext.keras_tools.optimizers import (
    before_clipping,
    build,
    configuration,
    innermost,
    iterations_of,
    loss_scale,
    members_of,
    trained_by,
    updaters_of,
    with_members,
)
from hvdext.keras_tools.selection import identity_of, path_of
from hvdext.keras_tools.slots import common_variables, slots_of
from hvdext.keras_tools.xla import compiled

_HOOK = "_hvdext_hook"


def hook_of(optimizer) -> ApplyHook | None:
    """The hook that `DistributedOptimizer` put into `optimizer`, None for a plain optimizer."""
    return getattr(innermost(optimizer), _HOOK, None)


def exchanges(optimizer) -> bool:
    """True if `optimizer`, or each member of a `MultiOptimizer`, combines its gradients over the ranks."""
    members = members_of(optimizer)
    return hook_of(optimizer) is not None or (bool(members) and all(map(hook_of, members)))


def hooks_of(optimizer) -> list[ApplyHook]:
    """The hooks in `optimizer` and, where it is a `MultiOptimizer`, in its members."""
    hooks = map(hook_of, with_members(optimizer))
    return [hook for hook in hooks if hook is not None]


class ApplyHook:
    """Stands in front of one optimizer's `apply`: decides whether, and hands on to who does what."""

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        exchange: GradientExchange,
        accumulator: Accumulator | None,
        weighing: Weighing,
    ):
        self.optimizer = optimizer
        self.exchange = exchange
        self.accumulator = accumulator
        self.weighing = weighing
        self._plain_apply = optimizer.apply
        self._ready_for: Callable[[], Ledger | None] = lambda: None  # the job whose ranks have agreed
        self._ready_ranks: tuple[int, ...] = ()  # which of them have
        self._kinds: list | None = None  # what the exchanged gradients are made of
        self._local: list[str] = []  # paths of what stays local on any rank
        self._roll_call: RollCall | None = None
        self._follow_traced: tuple | None = None  # (outer, ids of variables, function)
        self._guard = Guard(exchange)
        self.is_combined = False  # True while Keras' own apply works on combined gradients
        self._compiles_updates = False
        put_before(LossScaleOptimizer, "exchange", _before_loss_scale)
        if optimizer.gradient_accumulation_steps:
            before_clipping(optimizer, self._combine_accumulated)

    def put_into(self, outer) -> None:
        """Stands in front of the optimizer's `apply` from now on.

        The methods are put on the object: around it, another class would be saved with the model.

        Args:
            outer: the optimizer, or the `LossScaleOptimizer` around it.
        """
        setattr(self.optimizer, _HOOK, self)
        self.optimizer.apply = self.apply
        self.optimizer.register_local_var = self.exchange.register_local_var
        outer.register_local_var = self.exchange.register_local_var

    @without_autograph
    def apply(self, gradients, trainable_variables=None) -> None:
        """What the optimizer does instead of its own `apply`."""
        if self.is_combined:
            self._plain_apply(gradients, trainable_variables)
        else:
            self.step(self.optimizer, gradients, trainable_variables)

    def step(self, outer, gradients, trainable_variables=None) -> None:
        """One micro-batch: combines and applies its gradients, or keeps them until a cycle is full.

        Args:
            outer: the optimizer that Keras called: the hooked one, or the `LossScaleOptimizer` around it.
            gradients: scaled gradients, one per variable.
            trainable_variables: as in Keras' `apply`.
        """
        gradients = list(map(as_tensors, gradients))
        if not gradients:
            return
        variables = _built_variables(outer, gradients, trainable_variables)
        if put_off(Update(self, outer, gradients, variables)):
            return
        self._prepare_once(outer, gradients, variables)
        # Keras finds out that its data has ended by running one step more, which fails for want of a batch.
        # What does not wait for the batch would run all the same: counters, the roll call.
        with tf.control_dependencies(_latest(gradients)):
            self._step(outer, gradients, variables)

    def _step(self, outer, gradients, variables):
        weight = self.weighing.count()
        if self.has_keras_accumulation:
            gradients = self._weighed(gradients, variables, weight, weight)
            self._accumulate_in_keras(gradients, variables)
            return
        scale = loss_scale(outer)
        gradients = marked(times(gradients, 1 / scale), variables)
        accumulator = self.accumulator
        if accumulator is None:
            self._update(outer, gradients, variables, scale, weight, weight)
            return
        if weight is not None:
            gradients = weighed(gradients, variables, weight)
        # The condition counts steps, so all ranks enter the exchange together.
        full = accumulator.add(gradients, variables, list(map(is_overwritten, variables)), weight)

        def update():
            sums = None if weight is None else accumulator.weight()
            return self._update(outer, accumulator.take(), variables, scale, accumulator.passes, sums)

        tf.cond(full, update, lambda: tf.constant(False))

    def _update(self, outer, gradients, variables, scale, factor, weight):
        """Combines gradients over the ranks and lets Keras do the rest."""
        contributors, total = self._roll_call.take(True, weight) if self._roll_call else (None, None)
        gradients = self._weighed(gradients, variables, factor, weight, contributors, total)
        combined = self._combined(outer, gradients, variables, contributors)
        self._apply_combined(outer, times(combined, scale), variables)  # Keras removes the scale again
        return tf.constant(True)

    def _weighed(self, gradients, variables, factor, weight, ranks=None, total=None):
        """`factor * gradient`, divided by the mean of the ranks' weights; None in `weight`: as they are."""
        if weight is None:
            return gradients
        ranks = self.exchange.comm().size if ranks is None else ranks
        total = self.weighing.total(weight) if total is None else total
        return weighed(
            gradients, variables, tf.math.divide_no_nan(ranks * tf.cast(factor, tf.float64), total)
        )

    def _combined(self, outer, gradients, variables, contributors):
        with tf.control_dependencies([self._looked(variables)]):
            combined = self._exchanged(gradients, variables, contributors)
        is_scaled = isinstance(outer, LossScaleOptimizer)
        return self._spread_overflow(gradients, combined, variables) if is_scaled else combined

    def _looked(self, variables):
        """Whether the ranks still hold the same, seen now and then."""
        return self._guard.look(self.exchange.comm(), lambda: self._held(variables))

    def _held(self, variables):
        """What must be the same on all ranks: (path, variable) of each."""
        shared = {
            identity_of(v) for v, s in zip(variables, self.exchange.is_shared(variables), strict=True) if s
        }
        updaters = updaters_of(self.optimizer)
        held = [v for optimizer in updaters for v in common_variables(optimizer)]  # the causes come first
        held += [v for v in variables if identity_of(v) in shared]
        for optimizer in updaters:
            if not self.has_keras_accumulation:  # whose sums are each rank's own
                trained = trained_by(optimizer)
                held += [s.variable for s in slots_of(optimizer) if identity_of(trained[s.index]) in shared]
        return [(path_of(variable), variable) for variable in held]

    def _exchanged(self, gradients, variables, contributors):
        # Some steps may leave some variables out: where they stand among all that are exchanged.
        trained = trained_by(self.optimizer)
        all_exchanged = shared_of(trained, self.exchange.is_shared(trained))
        places = {identity_of(variable): i for i, variable in enumerate(all_exchanged)}
        found = [places.get(identity_of(variable)) for variable in variables]
        return self.exchange.combine(gradients, variables, contributors, found, self.weighing.rows())

    def _apply_combined(self, outer, combined, variables):
        is_dense = not any(isinstance(gradient, tf.IndexedSlices) for gradient in combined)

        def update(gradients):
            outer.apply(gradients, variables)

        self.is_combined = True
        try:
            (compiled(update) if self._compiles_updates and is_dense else update)(combined)
        finally:
            self.is_combined = False

    @property
    def expects_uneven_batches(self) -> bool:
        """Whether ranks may make different numbers of steps."""
        return self._roll_call is not None

    @property
    def has_keras_accumulation(self) -> bool:
        """Whether Keras adds up micro-batches itself (`gradient_accumulation_steps`)."""
        return bool(self.optimizer.gradient_accumulation_steps)

    def expect_uneven_batches(self, expected: bool) -> None:
        """Says whether ranks may make different numbers of steps from now on; the same on all ranks.

        A training step that has been traced already must be traced again.
        """
        self._roll_call = None
        self._follow_traced = None
        if expected:
            self._roll_call = RollCall(self.exchange, self.optimizer)

    def compile_updates(self, compiles: bool) -> None:
        """Says whether XLA compiles updates from now on; the same on all ranks, or their last digits differ.

        A training step that has been traced already must be traced again.
        """
        self._compiles_updates = compiles
        self._follow_traced = None

    def restart(self) -> None:
        """Forgets what held among the ranks so far, since others take part from now on.

        The next step compares the ranks anew and begins a cycle of micro-batches. A training step that has
        been traced already must be traced again.
        """
        self._ready_for = lambda: None
        self._kinds = None
        self._follow_traced = None
        self.drop_micro_batches()
        self._guard.look_next()

    def training_begins(self) -> None:
        """A new training: begins a cycle of micro-batches, and looks before the first update.

        Micro-batches that an earlier one has left over belong to other data, perhaps to other weights.
        """
        left = self.accumulator.drop() if self.accumulator is not None else 0
        if left and self.exchange.comm().rank == 0:
            warn(
                f"{left} micro-batches that an earlier training of {self.optimizer.name!r} has left over are "
                "dropped: backward_passes_per_step does not divide its number of batches."
            )
        self._guard.look_next()

    def epoch_begins(self) -> None:
        """Looks before the next update where all go on with the first rank's values, such as its rate."""
        if guards_of(self.exchange.comm()).on_divergence == "broadcast":
            self._guard.look_next()

    def drop_micro_batches(self) -> None:
        """Begins a cycle of micro-batches anew."""
        if self.accumulator is not None:
            self.accumulator.drop()

    def join(self, outer, variables) -> None:
        """Takes part in the other ranks' updates, without a gradient, until no rank has one left.

        Every rank that has expected uneven batches calls it once its batches have run out; all return
        together.

        Args:
            outer: the optimizer, or the `LossScaleOptimizer` around it.
            variables: its trainable variables.
        """
        if self.exchange.comm().size == 1:
            return
        self._prepare_once(outer, None, variables)
        if self._kinds is None:  # no rank has had a batch yet
            return
        ids = [id(variable) for variable in variables]
        if self._follow_traced is None or self._follow_traced[:2] != (outer, ids):
            follow = tf.function(lambda: self._follow(outer, variables), autograph=False)
            self._follow_traced = (outer, ids, follow)
        while self._follow_traced[2]().numpy() > 0:
            pass

    def _follow(self, outer, variables):
        """One update of the others; returns how many ranks have contributed to it."""
        assert self._roll_call is not None, "join() comes first"
        assert self._kinds is not None, "join() comes first"
        shared = self.exchange.is_shared(variables)  # what is local waits for this rank's next batch
        kinds = placed(self._kinds, shared)
        contributors, _ = self._roll_call.take(False)

        def update():
            gradients = empty_gradients(kinds, variables)
            scale = loss_scale(outer)
            combined = self._combined(outer, gradients, variables, contributors)
            pairs = [
                (g, v) for g, v, s in zip(combined, variables, shared, strict=True) if s and g is not None
            ]
            self._apply_combined(outer, times([g for g, _ in pairs], scale), [v for _, v in pairs])
            return tf.constant(True)

        tf.cond(contributors > 0, update, lambda: tf.constant(False))
        return contributors

    def _spread_overflow(self, gradients, combined, variables):
        """Makes all ranks skip when a gradient that stays local overflows on any of them.

        Combined gradients carry an infinity or NaN to every rank by themselves.
        """
        comm = self.exchange.comm()
        shared = self.exchange.is_shared(variables)
        local = [g for g, s in zip(gradients, shared, strict=True) if g is not None and not s]
        if comm.size == 1 or not self._local:
            return combined
        name = f"hvdext.grad.{self.exchange.name}.finite"
        (ranks,) = comm.allreduce([tf.cast(all_finite(local), tf.float32)], name)
        return poisoned(combined, unless=ranks == comm.size)

    def _accumulate_in_keras(self, gradients, variables):
        """Keras adds up micro-batches itself; what it is about to clip and apply is combined first."""
        pairs = zip(gradients, variables, strict=True)
        self._to_clip = [v for g, v in pairs if g is not None and not is_overwritten(v)]
        self._plain_apply(gradients, variables)

    def _combine_accumulated(self, gradients):
        with tf.control_dependencies([self._looked(self._to_clip)]):
            return self._exchanged(gradients, self._to_clip, None)

    def _prepare_once(self, outer, gradients, variables):
        """Prepares before the first step of a job; ranks that were lost or have come make another job."""
        comm = self.exchange.comm()
        ledger = comm.ledger
        if self._ready_for() is ledger and self._ready_ranks == comm.ranks:
            return
        with tf.init_scope():
            self.restart()
        self._prepare(outer, gradients, variables)
        if self._kinds is not None:
            self._ready_for = weakref.ref(ledger)
            self._ready_ranks = comm.ranks

    def _prepare(self, outer, gradients, variables):
        """Before the first step: everything that must hold on all ranks before they exchange numbers.

        `gradients` is None on a rank that has had no batch yet.
        """
        if self.exchange.comm().size > 1:
            check_keras_accumulation(outer, self.optimizer, variables)
        check_members(self.optimizer)
        accumulator = self.accumulator
        with tf.init_scope():  # eagerly, also while Keras traces its training step
            settings = {
                "optimizer": type(outer).__name__,
                "configuration": configuration(self.optimizer),
                "backward_passes_per_step": accumulator.passes if accumulator else 1,
                "average_aggregated_gradients": accumulator.average if accumulator else None,
                "uneven batches": self._roll_call is not None,
                "weight_by": self.weighing.described,
                "guards": guards_of(self.exchange.comm()),
                "compiled by XLA": self._compiles_updates,
            }
            if self.has_keras_accumulation:  # Keras exchanges by this count
                settings["iterations"] = int(iterations_of(self.optimizer))
            subject = f"DistributedOptimizer {renumbered([self.optimizer.name])[0]!r}"
            self.exchange.agree(subject, gradients, variables, settings)
            shared = self.exchange.is_shared(variables)
            self._kinds = None if gradients is None else kinds_of(shared_of(gradients, shared))
            if self._roll_call is not None:
                exchanged = shared_of(variables, shared)
                self._kinds = common_kinds(self.exchange.comm(), subject, self._kinds, exchanged)
            if self.exchange.comm().size > 1:
                self._local = local_on_any(self.exchange, variables)
                check_clipping(self.optimizer, self._local)


def _before_loss_scale(outer, gradients, trainable_variables, proceed):
    """The exchange in front of `LossScaleOptimizer.apply`, where the inner optimizer has one.

    Keras calls the inner optimizer's `apply` within `cond("my own gradients are finite")`. An exchange in
    there hangs as soon as one rank overflows and another does not; out here every rank takes part, and
    all see the same finite or infinite result.
    """
    hook = hook_of(outer)
    if hook is None or hook.is_combined:
        proceed(gradients, trainable_variables)
    else:
        hook.step(outer, gradients, trainable_variables)


def _latest(gradients):
    """The gradient that backward produces first, as a control dependency."""
    return [values_of(gradient) for gradient in gradients if gradient is not None][-1:]


def _built_variables(outer, gradients, trainable_variables):
    if trainable_variables is None and not outer.built:
        raise ValueError(
            "`trainable_variables` must be given until the optimizer is built. "
            f"Received: trainable_variables=None on the unbuilt optimizer {outer.name!r}."
        )
    variables = trained_by(outer) if trainable_variables is None else list(trainable_variables)
    if len(gradients) != len(variables):
        raise ValueError(
            "`gradients` must hold one gradient (or None) per variable. "
            f"Received: {len(gradients)} gradients for {len(variables)} variables."
        )
    build(outer, variables)
    return variables


def check_members(target):
    """Looks at a MultiOptimizer's members; a function may choose them as late as the first step."""
    for member in members_of(target):
        if hook_of(member) is not None:
            raise ValueError(
                "`optimizer` must not hold one that is distributed already: its gradients would be combined "
                f"twice. Received: a MultiOptimizer with {member.name!r}."
            )
        if member.gradient_accumulation_steps:
            raise ValueError(
                "`gradient_accumulation_steps` must be None inside a MultiOptimizer: use "
                "`backward_passes_per_step`. Received: gradient_accumulation_steps="
                f"{member.gradient_accumulation_steps} on {member.name!r}."
            )
