"""After training: every rank ends with the same weights, however far apart they have trained."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_whole
from hvdext.common.signals import GracefulStop
from hvdext.common.wording import named_ranks
from hvdext.consensus import scoring
from hvdext.consensus.options import ConsensusOptions
from hvdext.consensus.unify import ConsensusReport, floats, unify
from hvdext.gradients.apply_hook import hook_of
from hvdext.keras_tools.sample_counter import SampleCounter
from hvdext.sync.attachment import attached

_NAME = "hvd.callbacks.ConsensusAveraging"
_STOP, _INTERRUPTED, _ENDED = 1, 2, 4  # what a rank tells the others where they meet


class ConsensusAveraging(keras.callbacks.Callback):
    """Gives all ranks the same final weights, and ends their training together.

    When training ends (after its epochs, by early stopping or by an interrupt on any rank):

        all ranks have ended, and what `ParameterSync` objects had on its way is finished
        common weights = sum over ranks of samples_r / (sum of samples) * weights_r     (take="mean")
                         or the weights of the rank with the lowest score               (take="best")
        batch normalization statistics are estimated anew                               (on request)
        the ranks compare a digest of all bits

    Averaged are all floating weights, the statistics of batch normalization among them; layers' counters
    and random states stay each rank's own. The optimizer's state follows: its slots are averaged in the same
    way, `iterations` becomes the largest, a loss scale the smallest. Averaging makes sense of ranks that have
    begun with the same weights (`BroadcastGlobalVariablesCallback`, `WarmupPerturbation`). Where they are
    equal already, as with `hvd.DistributedOptimizer`, nothing changes.

    Ranks stop together. Every `check_every` batches, and at the end of each epoch, they tell each other
    whether one wants to stop; then `stop_training` becomes True on all of them at once. Until then a rank's
    own `stop_training` is held back. Ranks with epochs of different lengths stop at the same check. The
    first SIGINT (Ctrl-C) or SIGTERM asks for such a stop, the second has its usual effect. (Ctrl-C to
    horovodrun reaches all ranks as SIGTERM; it kills those that still run five seconds later.) With
    `UnevenBatches` ranks check at the end of epochs only. Ranks of an asynchronous `ParameterSync` are at
    different steps and never check: there the wish to stop travels with the weights.

    Put it after all callbacks that stop the training or change weights, such as
    `EarlyStopping(restore_best_weights=True)`: it averages what they leave.

    The mean over several epochs' weights is stochastic weight averaging: Izmailov et al., "Averaging Weights
    Leads to Wider Optima and Better Generalization" (2018, arXiv:1803.05407). Averaging once, at the end,
    is after Zinkevich et al., "Parallelized Stochastic Gradient Descent" (2010).

    Args:
        take: "mean", or "best": the weights, and optimizer state, of the rank with the lowest score, the
            lowest rank's of several.
        weight_by: with "mean", "samples": ranks weigh in proportion to the samples they have trained on in
            this fit, which the callback counts. None: all weigh the same.
        last_epochs: each rank brings the mean of its weights at the end of its last so many epochs, at
            least 1; it keeps so many copies in the host's memory. 1: the weights that it ends with.
        probe: with "best", a batch (inputs, targets) or (inputs, targets, sample weights). Rank 0's is sent
            to all; the score is the compiled model's loss on it, without dropout.
        score: instead of `probe`, a function `score(model) -> float`; lower is better.
        reestimate_batch_norm: (data, batches): after averaging, statistics of `BatchNormalization` layers
            become the plain mean of the moments of the first so many batches of `data` (a dataset, PyDataset
            or list of batches, with targets or without), and then the mean of all ranks' estimates. Ranks may
            bring the same data or their own.
        evaluate: data for `model.evaluate`, (inputs, targets) or a dataset: how good each rank's weights
            were, and how good the common ones are, goes to `report`. Ranks may bring the same data or
            their own.
        optimizer_state: whether to agree on the optimizer's variables, too.
        check_every: how many batches of an epoch to train between two checks, at least 1.
        on_nonfinite: what becomes of a rank with weights that are not finite. "raise": an error on all ranks
            names it. "skip_rank": it is left out, and takes the others' result.
        verbose: 1: rank 0 prints a line at the end.

    Attributes:
        report: a `ConsensusReport` after training: shares, distances from the common weights, digest,
            scores and metrics; None before.
        interrupted: whether a signal on any rank, or `interrupt()`, has ended the training.

    Raises:
        TypeError, ValueError: if an argument breaks its rule. On every rank alike: when training begins, if
            the ranks' settings differ; when it ends, if the models differ, or weights or scores are not
            finite.
        RuntimeError: before `hvd.init()`. When training ends, on every rank alike, if a rank cannot evaluate,
            score or find its batches (a ValueError, TypeError or OSError where that is what it has met), or
            if the digests differ.
    """

    @suggests_keywords
    def __init__(
        self,
        take: str = "mean",
        weight_by: str | None = "samples",
        last_epochs: int = 1,
        *,
        probe: tuple | None = None,
        score: scoring.Score | None = None,
        reestimate_batch_norm: tuple[Iterable, int] | None = None,
        evaluate: Any = None,
        optimizer_state: bool = True,
        check_every: int = 10,
        on_nonfinite: str = "raise",
        verbose: int = 1,
    ):
        super().__init__()
        last_epochs = require_whole("last_epochs", last_epochs, 1)
        check_every = require_whole("check_every", check_every, 1)
        self._options = ConsensusOptions(
            take=take,
            weight_by=weight_by,
            probe=probe,
            score=score,
            reestimate_batch_norm=reestimate_batch_norm,
            evaluate=evaluate,
            optimizer_state=bool(optimizer_state),
            on_nonfinite=on_nonfinite,
        )
        self._check_every = check_every
        self._verbose = verbose
        self._epochs: deque[list[np.ndarray]] = deque(maxlen=last_epochs)
        self._stop = GracefulStop(
            f"training ends on all ranks when they check next, every {check_every} batches and after each "
            "epoch. A second signal ends this process at once."
        )
        self._counter: SampleCounter | None = None
        self._samples_before = 0
        self._checked = 0  # batches of this epoch, when the ranks last met
        self._wants_stop = False
        self._is_training = False
        self.report: ConsensusReport | None = None
        self.interrupted = False

    def interrupt(self) -> None:
        """Asks all ranks to end the training when they check next, as the first signal does."""
        self._stop.requested = True

    def unify(
        self,
        model: keras.Model,
        samples: int | None = None,
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> ConsensusReport:
        """Gives all ranks the same weights, in a loop of your own; every rank must call it.

        Args:
            model: a built model.
            samples: how many samples this rank has trained on; needed with weight_by="samples".
            optimizer: whose state to agree on, too; default: the one the model is compiled with.

        Returns:
            The report, also in the attribute `report`.
        """
        return self._unify(model, samples, optimizer or getattr(model, "optimizer", None), None)

    # -- Keras' hooks ----------------------------------------------------------------------------------

    def set_model(self, model):
        self._let_go()  # where a fit has died, Keras has not said that it ended
        super().set_model(model)
        if self._options.weight_by == "samples":
            self._counter = SampleCounter.of(model)
            self._counter.acquire()

    def on_train_begin(self, logs=None):
        comm = current()
        facts = self._options.facts() | {
            "last_epochs": self._epochs.maxlen,
            "check_every": self._check_every,
            "asynchronous": bool(self._asynchronous()),
            "UnevenBatches": self._is_uneven(),
        }
        agreement.check(comm, _NAME, facts)
        self._epochs.clear()
        self._wants_stop, self.interrupted, self.report = False, False, None
        self._samples_before = self._counter.total() if self._counter else 0
        self._is_training = True
        self._stop.install()

    def on_epoch_begin(self, epoch, logs=None):
        self._checked = 0

    def on_train_batch_end(self, batch, logs=None):
        self._note_wishes()
        if current().size == 1 or self._asynchronous():
            self._pass_on()
            return
        self.model.stop_training = False
        done = batch + 1  # with steps_per_execution, numbers are left out
        due = done // self._check_every > self._checked // self._check_every
        self._checked = done
        if due and not self._is_uneven():
            self._meet()

    def on_epoch_end(self, epoch, logs=None):
        if self._epochs.maxlen != 1:
            self._epochs.append([tf.convert_to_tensor(v).numpy() for v in floats(self.model.weights)])
        self._note_wishes()
        if current().size == 1 or self._asynchronous():
            self._pass_on()
        else:
            self._meet()

    def on_train_end(self, logs=None):
        try:
            self._note_wishes()
            for sync in self._asynchronous():  # which waits for the others' last steps
                sync.end()
            while not self._meet(has_ended=True):  # ranks with more batches or epochs go on, and check
                continue
            for sync in attached(self.model):
                sync.end()
            samples = self._counter.total() - self._samples_before if self._counter else None
            self._unify(self.model, samples, self.model.optimizer, self._mean_of_epochs())
        finally:
            self._is_training = False
            self._let_go()

    def on_test_begin(self, logs=None):
        if not self._is_training:  # `evaluate` on its own
            self._let_go()

    def on_predict_begin(self, logs=None):
        self._let_go()

    # -- stopping together -----------------------------------------------------------------------------

    def _note_wishes(self):
        if self.model.stop_training or self._stop.requested:
            self._wants_stop = True

    def _meet(self, has_ended=False) -> bool:
        """Tells the others what this rank wants and does as they want; True if all have ended.

        One name for all meetings: ranks with different numbers of batches, or one that has left `fit` early,
        still find each other.
        """
        mine = _STOP * self._wants_stop + _INTERRUPTED * self._stop.requested + _ENDED * has_ended
        everyone = current().allgather(tf.constant([mine], tf.uint8), "hvdext.consensus.meeting").numpy()
        self._wants_stop = bool(np.any(everyone & _STOP))
        self.interrupted = self.interrupted or bool(np.any(everyone & _INTERRUPTED))
        self.model.stop_training = self._wants_stop
        return bool(np.all(everyone & _ENDED))

    def _asynchronous(self) -> list:
        return [sync for sync in attached(self.model) if getattr(sync, "is_asynchronous", False)]

    def _pass_on(self):
        """Stops at once, and lets asynchronous ranks know; or does as they have asked."""
        syncs = self._asynchronous()
        if self._wants_stop:
            for sync in syncs:
                sync.request_stop()
        elif any(sync.stop_requested for sync in syncs):
            self._wants_stop = True
        self.model.stop_training = self._wants_stop

    def _is_uneven(self) -> bool:
        """True if a rank without batches waits in the others' updates, where it cannot check."""
        hook = hook_of(self.model.optimizer)
        return hook is not None and hook.expects_uneven_batches

    # -- unifying --------------------------------------------------------------------------------------

    def _mean_of_epochs(self):
        if not self._epochs:
            return None
        columns = zip(*self._epochs, strict=True)
        means = [np.mean(column, axis=0, dtype=np.float64).astype(column[0].dtype) for column in columns]
        self._epochs.clear()
        return means

    def _unify(self, model, samples, optimizer, means):
        comm = current()
        self.report = unify(comm, model, optimizer, self._options, samples, means)
        if self._verbose and comm.rank == 0:
            print(_line(self.report, self.interrupted), flush=True)  # a launcher may end the process soon
        return self.report

    def _let_go(self):
        self._stop.uninstall()
        if self._counter is not None:
            self._counter.release()
            self._counter = None


def _line(report: ConsensusReport, interrupted: bool) -> str:
    start = "Consensus after an interrupt" if interrupted else "Consensus"
    shares = ", ".join(f"{share:.4g}" for share in report.shares)
    mean, largest = report.mean_distance, report.largest_distance
    parts = [
        f"ranks weighing {shares}",
        f"their weights were {mean:.4g} away on average, {largest:.4g} at most",
        f"now all ranks are equal (SHA-256 {report.digest[:12]})",
    ]
    if report.skipped:
        parts.insert(1, f"{named_ranks(report.skipped)} left out, not finite")
    if report.metrics_before is not None and report.metrics_after is not None:
        for name in report.metrics_before[0]:
            before, after = (
                math.fsum(metrics[name] for metrics in found) / len(found)
                for found in (report.metrics_before, report.metrics_after)
            )
            parts.append(f"{name} {before:.4g} (mean of the ranks) -> {after:.4g}")
    return f"{start}, {report.take}: " + "; ".join(parts)
