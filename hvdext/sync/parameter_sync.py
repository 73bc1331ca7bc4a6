"""`ParameterSync`: ranks exchange their weights while they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import tensorflow as tf

from hvdext.collectives.digest import digest
from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.common.log import warn
from hvdext.common.wording import describe
from hvdext.gradients.apply_hook import hook_of
from hvdext.keras_tools.models import is_built
from hvdext.keras_tools.numbering import renumbered
from hvdext.keras_tools.optimizers import build, innermost
from hvdext.keras_tools.sample_counter import SampleCounter
from hvdext.sync.attachment import Attachment, Purpose, attach, attached, detach
from hvdext.sync.engine import names
from hvdext.sync.engine.asynchronous import AsynchronousEngine
from hvdext.sync.engine.engine import Engine, Exchanged, Totals
from hvdext.sync.engine.members import members
from hvdext.sync.engine.stepwise import StepwiseEngine
from hvdext.sync.local_training import refuse_exchanged_gradients
from hvdext.sync.pieces import Piece
from hvdext.sync.rule import Mean, Outer, Pull
from hvdext.sync.settings import Settings
from hvdext.sync.what import All, What
from hvdext.sync.when import When
from hvdext.sync.whom import Everyone, Whom
from hvdext.sync.wire import Wire, wire_of


@dataclass
class _Run:
    """What belongs to one training: made when it begins, gone when it ends or has failed.

    Attributes:
        waits_for_epoch: within `fit`, what was loaded is taken up with the first epoch, not before: a
            BackupAndRestore may load weights when training begins, after this callback.
        batch: Keras' number of the latest batch of this epoch.
        samples: how many had been counted when that batch ended.
    """

    waits_for_epoch: bool = False
    batch: int = -1
    samples: int = 0


class ParameterSync(keras.callbacks.Callback):
    """Exchanges weights between the ranks, as five independent answers say.

    In `model.fit` it is a callback; the model must be built, and all ranks start from the same weights
    (`BroadcastGlobalVariablesCallback`, `WarmupPerturbation`). In a loop of your own:

        sync = hvd.sync.LocalSGD(every=8)
        sync.begin(model, optimizer)
        for batch in batches:
            train(batch)
            sync.step(samples=len(batch))
        sync.end()

    Its state (what the ranks have in common, outer optimizers, clocks, exchanges on their way) is saved and
    loaded with the model's weights, by `.keras` and `.weights.h5` files alike. Where ranks differ, each needs
    a file of its own. To load weights before `fit`, call `sync.attach(model)` first.

    Put it before callbacks that save or change weights, such as BackupAndRestore or EarlyStopping with
    restore_best_weights=True. What is on its way is merged when the last epoch ends, so that weights which
    are restored after that stay as they are; only `Always`, `AtEnd` and `Adaptive` with a delay exchange or
    merge when training ends, in the order of the callbacks.

    Several of them may work on one model, on different parts.

    Args:
        what: which variables, `hvd.sync.All()`, `Matching`, `Rotating`.
        when: `hvd.sync.Every(steps)`, `EveryEpoch`, `AtEnd`, `Always`, `Adaptive`. All but `Always` need
            ranks that train equally many steps.
        wire: how values travel: "float32" (as exact as the variables), "float16", "bfloat16", "int8",
            "int4", or a `hvd.sync.Wire`.
        whom: with whom, `hvd.sync.Everyone()`, `Group`, `Pairs`, `Ring`, `Exponential`, `Hierarchical`.
        rule: what becomes of the mean, `hvd.sync.Mean()`, `Pull`, `Outer`.
        on_nonfinite: "raise" if a rank's weights are not finite, or "skip_rank": go on with the others' mean,
            which that rank takes as well, of all fragments at once. What is not exchanged stays as it is.
        name: part of the collectives' names, of letters, digits, "_" and "-"; None: numbered.

    Raises:
        TypeError, ValueError: if an answer is not one, or two contradict each other. When training begins, on
            every rank alike: if settings, models or resumed steps differ, a pattern matches nothing, there
            are more fragments than layers, the number of ranks does not fit or the optimizer exchanges the
            gradients of what is to be averaged. During training, on every
            rank: if weights are not finite, with "skip_rank" of all ranks.
        RuntimeError: before `hvd.init()`.
    """

    @suggests_keywords
    def __init__(
        self,
        when: When,
        *,
        what: What | None = None,
        wire: str | Wire = "float32",
        whom: Whom | None = None,
        rule: Mean | Pull | Outer | None = None,
        on_nonfinite: str = "raise",
        name: str | None = None,
    ):
        super().__init__()
        names.check_name(name)
        self.settings = Settings(
            what=what if what is not None else All(),
            when=when,
            wire=wire_of(wire),
            whom=whom if whom is not None else Everyone(),
            rule=rule if rule is not None else Mean(),
            on_nonfinite=on_nonfinite,
        )
        self._name = name
        self._listeners: list[Callable[[Exchanged], None]] = []
        self._measures = self.settings.when.measures == "divergence"
        self._attachment: Attachment | None = None  # from `attach` until there is another model
        self._run: _Run | None = None  # from `begin` or `on_train_begin` until training ends or has failed
        # From `set_model`, after which Keras makes its training function, until `fit` ends or another begins.
        self._counter: SampleCounter | None = None

    # -- for loops of your own -------------------------------------------------------------------------

    def attach(self, model: keras.Model) -> None:
        """Makes this sync's state a part of `model`'s checkpoints, to be loaded before training begins.

        With another model than before it begins anew, and the earlier one's checkpoints are without it.

        Raises:
            ValueError: if another sync of this name is attached already, or one that has it as its number.
        """
        if self._attachment is not None and self._attachment.model is not model:
            self._move_out(self._attachment)
        if self in attached(model):
            return
        places = [other._attachment.place for other in attached(model)]
        if self._name in places:
            raise ValueError(
                "`name` must differ between the syncs of one model, and from the numbers of those without. "
                f"Received: name={self._name!r} twice."
            )
        if self._attachment is None:
            self._attachment = Attachment(model)
        attach(model, self)
        self._attachment.hang(self._name or names.free_number(places))

    def begin(self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None) -> None:
        """Compares the ranks and makes ready; every rank must call it, before the first step.

        Called again for the same model, it goes on where it was. With `Group`, all ranks of the job meet in
        the first sync that they begin, later only those of a group.

        Args:
            model: a built model.
            optimizer: whose slots may be exchanged; default: the one the model is compiled with.
        """
        self._prepare(model, optimizer)
        self._start(0)

    def _prepare(self, model, optimizer):
        comm = members(current(), self.settings.whom)
        self.attach(model)
        home = self._attachment
        assert home is not None
        self._run = _Run()
        optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
        problem, fragments = None, []
        try:
            fragments = self._fragments(comm, model, optimizer)
        except Exception as error:  # a user's predicate may raise anything
            problem = describe(error)
        pieces = [(id(p.variable), p.start, p.stop) for pieces in fragments for p in pieces]
        purpose = Purpose(current().ledger, pieces, self._measures)
        facts = self._facts(fragments, goes_on=home.made_for == purpose)
        agreement.check(comm, "hvd.callbacks.ParameterSync", facts, problem)
        _warn_unless_alike(
            comm,
            [piece.variable for pieces in fragments for piece in pieces],
            home.engine is None and home.loaded is None,
        )
        if home.engine is not None and home.made_for == purpose:
            home.engine.train_with(optimizer)
            return
        if home.made_for is not None and home.made_for.differs_in_measuring_only(purpose):
            home.loaded = home.state()
        kind = AsynchronousEngine if self.is_asynchronous else StepwiseEngine
        name = names.agree(comm, self._name)
        home.engine = kind(name, self.settings, fragments, comm, self._measures, self._tell, optimizer)
        names.take(name, home.engine)
        home.made_for = purpose
        home.engine.share_centres()

    def _start(self, epoch):
        """Takes up what has been loaded, if all ranks have loaded the same point of training."""
        engine, home = self._running(), self._attachment
        problem = None
        if home is not None and home.loaded is not None:
            try:
                home.restore(home.loaded)
            except ValueError as error:
                problem = str(error)
        facts: dict[str, object] = {}
        if not self.is_asynchronous:
            facts |= {"steps trained so far": engine.trained.steps, "epoch": epoch}
        agreement.check(engine.comm, "hvd.callbacks.ParameterSync", facts, problem)
        if isinstance(engine, AsynchronousEngine):
            engine.start()

    def step(self, steps: int = 1, samples: int = 0) -> None:
        """Call it after each training step; starts and merges what is due.

        Args:
            steps: how many have been made since the last call.
            samples: on how many samples, where the rule weighs by them.
        """
        _require_eager("step")
        self._running().step(steps, samples)

    def end_epoch(self) -> None:
        """Call it after each epoch."""
        _require_eager("end_epoch")
        self._running().end_epoch()

    def end(self) -> None:
        """Finishes what is on its way; every rank must call it. A second call does nothing."""
        if self._run is None:
            return
        _require_eager("end")
        self._start_once()
        self._run = None
        engine = self._running()
        has_landed = engine.land()
        optimizer = innermost(self.model.optimizer) if self.model is not None else None
        if has_landed and optimizer is not None and getattr(optimizer, "use_ema", False):
            # Keras has put the averages in the weights' place; what has landed since came on top.
            optimizer.finalize_variable_values(self.model.trainable_weights)
        engine.end()

    def abandon(self) -> None:
        """Forgets a training that has failed: exchanges on their way are not merged."""
        self._run = None
        if self._engine is not None:
            self._engine.abandon()

    # -- what it has done ------------------------------------------------------------------------------

    @property
    def is_asynchronous(self) -> bool:
        """True if ranks may make different numbers of steps."""
        return self.settings.when.is_asynchronous

    @property
    def stop_requested(self) -> bool:
        """True once any rank of an asynchronous job has asked all to end."""
        return isinstance(self._engine, AsynchronousEngine) and self._engine.stop_requested

    def request_stop(self) -> None:
        """Asks all ranks of an asynchronous job to end their training."""
        engine = self._running()
        if not isinstance(engine, AsynchronousEngine):
            raise ValueError(
                "`request_stop` needs when=Always(): other ranks' steps are in step with this one's. "
                f"Received: when={self.settings.when!r}."
            )
        engine.request_stop()

    @property
    def totals(self) -> Totals:
        """Exchanges so far, and the seconds that training has waited for them or run beside them."""
        return self._running().totals

    @property
    def fragments(self) -> list[list[Piece]]:
        """What is exchanged, fragment by fragment."""
        return [state.fragment.pieces for state in self._running().states]

    @property
    def steps(self) -> int:
        """Steps this rank has trained."""
        return self._running().trained.steps

    @property
    def interval(self) -> int | None:
        """The current interval of an `Adaptive` sync in steps; None for others."""
        return getattr(self._running().schedule, "interval", None)

    def listen(self, listener: Callable[[Exchanged], None], *, measures: bool = False) -> None:
        """Calls `listener` after each merge; all ranks must do so alike, before training begins.

        Args:
            listener: called with an `Exchanged`; of an asynchronous sync, in its thread.
            measures: also measure the ranks' distances, at the cost of one small exchange each time.
        """
        self._listeners.append(listener)
        self._measures = self._measures or measures

    # -- Keras' hooks ----------------------------------------------------------------------------------

    def set_model(self, model):
        for sync in [self, *attached(model)]:
            if sync._run is not None:  # of a `fit` that has died: Keras has not said that it ended
                sync.abandon()
                sync._let_go()
        self._let_go()
        super().set_model(model)
        self.attach(model)
        if self.settings.rule.weight_by == "samples":
            self._counter = SampleCounter.of(model)
            self._counter.acquire()

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        if is_built(self.model):
            build(optimizer, self.model.trainable_variables)
        self._prepare(self.model, optimizer)
        self._run = _Run(waits_for_epoch=True, samples=self._counter.total() if self._counter else 0)

    def on_epoch_begin(self, epoch, logs=None):
        self._start_once(epoch)
        self._training().batch = -1

    def _start_once(self, epoch=None):
        run = self._training()
        if run.waits_for_epoch:
            run.waits_for_epoch = False
            self._start(epoch)

    def on_train_batch_end(self, batch, logs=None):
        run = self._training()
        known = (self.params or {}).get("steps")
        if known is not None:  # with steps_per_execution Keras counts the last call as if it were full
            batch = min(batch, known - 1)
        steps, run.batch = batch - run.batch, batch
        samples = 0
        if self._counter is not None:
            before, run.samples = run.samples, self._counter.total()
            samples = run.samples - before
        self.step(steps, samples)

    def on_epoch_end(self, epoch, logs=None):
        self.end_epoch()
        stops = getattr(self.model, "stop_training", False)
        if stops or epoch + 1 == (self.params or {}).get("epochs"):
            # What is on its way belongs to weights that a callback may replace when training ends.
            self._running().settle()

    def on_train_end(self, logs=None):
        self.end()
        self._let_go()

    def _let_go(self):
        """Leaves the model's training as it was; the sync's state stays a part of its checkpoints."""
        if self._counter is not None:
            self._counter.release()
            self._counter = None
        if self.model is not None:
            detach(self.model, self)

    # -- parts -----------------------------------------------------------------------------------------

    def _fragments(self, comm, model, optimizer) -> list[list[Piece]]:
        if not is_built(model):
            raise ValueError(
                "`ParameterSync` needs a built model: begin it with a keras.Input or call it once. "
                f"Received: the unbuilt {model.name!r}."
            )
        self.settings.whom.check(comm)
        hook = hook_of(optimizer) if optimizer is not None else None
        if hook is not None and hook.expects_uneven_batches and not self.is_asynchronous:
            raise ValueError(
                "`ParameterSync` needs ranks that train equally many steps, unless when=Always(). "
                "Received: an optimizer with hvd.callbacks.UnevenBatches."
            )
        fragments = self.settings.what.fragments(model, optimizer)
        refuse_exchanged_gradients(comm, model, optimizer, fragments)
        return fragments

    def _facts(self, fragments, goes_on):
        facts = self.settings.facts() | {"name": self._name, "measures": self._measures}
        facts["goes on from an earlier training"] = goes_on
        labels = iter(renumbered([piece.label for pieces in fragments for piece in pieces]))
        for i, pieces in enumerate(fragments):
            facts[f"fragment {i}"] = [(next(labels), piece.shape) for piece in pieces]
        if not self.is_asynchronous:
            facts["steps per epoch"] = (self.params or {}).get("steps")
            facts["epochs"] = (self.params or {}).get("epochs")
        return facts

    def _move_out(self, home: Attachment):
        """Leaves nothing of itself with the model that it has worked on, nor takes anything along."""
        if self._run is not None:
            self.abandon()
        detach(home.model, self)
        home.take_down()
        self._attachment = None

    @property
    def _engine(self) -> Engine | None:
        return None if self._attachment is None else self._attachment.engine

    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(_NOT_BEGUN)
        return self._engine

    def _training(self) -> _Run:
        if self._run is None:
            raise RuntimeError(_NOT_BEGUN)
        return self._run

    def _tell(self, exchanged):
        for listener in self._listeners:
            listener(exchanged)


_NOT_BEGUN = "ParameterSync has not begun: call `sync.begin(model)`, or pass it to `fit`."


def _require_eager(method):
    if not tf.executing_eagerly():
        raise RuntimeError(
            f"`sync.{method}` must be called outside of tf.function, after the step: within, it would run "
            "but once, while TensorFlow traces it."
        )


def _warn_unless_alike(comm, variables, is_fresh):
    """Every rank calls it, also one that goes on from a checkpoint."""
    if comm.size == 1:
        return
    digests = comm.allgather_object(digest(variables) if is_fresh else None, "hvdext.sync.digest")
    if comm.rank == 0 and None not in digests and len(set(digests)) > 1:
        warn(
            "The ranks start from different weights. Put hvd.callbacks.BroadcastGlobalVariablesCallback(0) "
            "or hvd.callbacks.WarmupPerturbation before ParameterSync, unless that is what you want."
        )
