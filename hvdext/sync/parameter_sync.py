"""`ParameterSync`: ranks exchange their weights while they train."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import keras
import numpy as np

from hvdext import agreement
from hvdext.arguments import suggests_keywords
from hvdext.comm import current
from hvdext.optimizer import build
from hvdext.sync.asynchronous import AsynchronousEngine
from hvdext.sync.attachment import attach, attached, detach
from hvdext.sync.digest import digest
from hvdext.sync.engine import Engine, Exchanged, Totals
from hvdext.sync.rule import Mean, Outer, Pull
from hvdext.sync.samples import SampleCounter
from hvdext.sync.saved_state import SavedState
from hvdext.sync.settings import Settings
from hvdext.sync.stepwise import StepwiseEngine
from hvdext.sync.what import All, Piece, What
from hvdext.sync.when import When
from hvdext.sync.whom import Everyone, Whom
from hvdext.sync.wire import Wire
from hvdext.variables import is_built


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
    a file of its own. Put it before callbacks that save, such as BackupAndRestore; to load weights before
    `fit`, call `sync.attach(model)` first.

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
            which that rank takes as well.
        name: part of the collectives' names; None: numbered.

    Raises:
        TypeError, ValueError: if an answer is not one, or two contradict each other. When training begins, on
            every rank alike: if settings, models or resumed steps differ, a pattern matches nothing, there
            are more fragments than layers or the number of ranks does not fit. During training, on every
            rank: if weights are not finite.
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
        self.settings = Settings(
            what=what if what is not None else All(),
            when=when,
            wire=wire,  # type: ignore[arg-type]
            whom=whom if whom is not None else Everyone(),
            rule=rule if rule is not None else Mean(),
            on_nonfinite=on_nonfinite,
        )
        self._name = name
        self._engine: Engine | None = None
        self._engine_for: tuple | None = None
        self._loaded: dict[str, np.ndarray] | None = None
        self._counter: SampleCounter | None = None
        self._samples_before = 0
        self._batch = -1
        self._has_ended = True
        self._listeners: list[Callable[[Exchanged], None]] = []
        self._measures = self.settings.when.measures == "divergence"

    # -- for loops of your own -------------------------------------------------------------------------

    def attach(self, model: keras.Model) -> None:
        """Makes this sync's state a part of `model`'s checkpoints, to be loaded before training begins."""
        if self not in attached(model):
            attach(model, self)
            name = self._name or str(len(attached(model)) - 1)
            setattr(model, f"_hvdext_sync_{name}", SavedState(self._state, self._restore))

    def begin(self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None) -> None:
        """Compares the ranks and makes ready; every rank must call it, before the first step.

        Called again for the same model, it goes on where it was.

        Args:
            model: a built model.
            optimizer: whose slots may be exchanged; default: the one the model is compiled with.
        """
        comm = self.settings.members(current())
        self.attach(model)
        self._has_ended = False
        optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
        problem, fragments = None, []
        try:
            fragments = self._fragments(comm, model, optimizer)
        except ValueError as error:
            problem = str(error)
        agreement.check(comm, "hvd.callbacks.ParameterSync", self._facts(model, fragments, problem), problem)
        if self._engine is None and self._loaded is None:
            _warn_unless_alike(comm, [piece.variable for pieces in fragments for piece in pieces])
        made_for = (model, current().ledger, self._measures)
        if self._engine is None or self._engine_for != made_for:
            kind = AsynchronousEngine if self.is_asynchronous else StepwiseEngine
            name = self._name or str(attached(model).index(self))
            self._engine = kind(name, self.settings, fragments, comm, self._measures, self._tell)
            self._engine_for = made_for
            self._engine.share_centres()
        if self._loaded is not None:
            self._restore(self._loaded)
        if isinstance(self._engine, AsynchronousEngine):
            self._engine.start()
        else:
            steps = self._engine.trained.steps
            agreement.check(comm, "hvd.callbacks.ParameterSync", {"steps trained so far": steps})

    def step(self, steps: int = 1, samples: int = 0) -> None:
        """Call it after each training step; starts and merges what is due.

        Args:
            steps: how many have been made since the last call.
            samples: on how many samples, where the rule weighs by them.
        """
        self._running().step(steps, samples)

    def end_epoch(self) -> None:
        """Call it after each epoch."""
        self._running().end_epoch()

    def end(self) -> None:
        """Finishes what is on its way; every rank must call it. A second call does nothing."""
        if not self._has_ended:
            self._has_ended = True
            self._running().end()

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
        self.begin(self.model, optimizer)
        self._samples_before = self._counter.total() if self._counter else 0

    def on_epoch_begin(self, epoch, logs=None):
        self._batch = -1

    def on_train_batch_end(self, batch, logs=None):
        steps, self._batch = batch - self._batch, batch
        samples = 0
        if self._counter is not None:
            before, self._samples_before = self._samples_before, self._counter.total()
            samples = self._samples_before - before
        self.step(steps, samples)

    def on_epoch_end(self, epoch, logs=None):
        self.end_epoch()

    def on_train_end(self, logs=None):
        self.end()
        self._let_go()

    def _let_go(self):
        """Leaves the model as it was; the sync's state stays a part of its checkpoints."""
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
        return self.settings.what.fragments(model, optimizer)

    def _facts(self, model, fragments, problem):
        facts = self.settings.facts() | {"name": self._name, "measures": self._measures}
        for i, pieces in enumerate(fragments):
            facts[f"fragment {i}"] = [(piece.label, piece.shape) for piece in pieces]
        if not self.is_asynchronous:
            facts["steps per epoch"] = (self.params or {}).get("steps")
            facts["epochs"] = (self.params or {}).get("epochs")
        return facts

    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("ParameterSync has not begun: call `sync.begin(model)`, or pass it to `fit`.")
        return self._engine

    def _tell(self, exchanged):
        for listener in self._listeners:
            listener(exchanged)

    def _state(self):
        if self._engine is None:
            return self._loaded or {}
        return self._engine.state()

    def _restore(self, found):
        if self._engine is None:
            self._loaded = found
        else:
            self._engine.restore(found)
            self._loaded = None


def _warn_unless_alike(comm, variables):
    digests = comm.allgather_object(digest(variables), "hvdext.sync.digest")
    if comm.rank == 0 and len(set(digests)) > 1:
        warnings.warn(
            "The ranks start from different weights. Put hvd.callbacks.BroadcastGlobalVariablesCallback(0) "
            "or hvd.callbacks.WarmupPerturbation before ParameterSync, unless that is what you want.",
            stacklevel=3,
        )
