"""Callbacks that keep the state of an elastic training up to date within `model.fit`."""

from __future__ import annotations

import keras

from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_whole
from hvdext.gradients.apply_hook import hook_of


class _Tracker(keras.callbacks.Callback):
    """Writes the progress of `fit` into a state, at the latest when that state is about to be committed.

    Callbacks run in the order in which they are listed. A commit that came first would keep the weights of
    one batch with the number of the batch before it; so it asks the state's trackers of its `fit` first.
    """

    def __init__(self, state):
        super().__init__()
        self.state = state

    def on_train_begin(self, logs=None):
        _trackers_of(self.state)[type(self)] = self

    def batch_done(self, batch):
        """Takes note of a finished batch; calling it again changes nothing."""

    def epoch_done(self, epoch):
        """Takes note of a finished epoch; calling it again changes nothing."""

    def on_train_batch_end(self, batch, logs=None):
        self.batch_done(batch)

    def on_epoch_end(self, epoch, logs=None):
        self.epoch_done(epoch)


class CommitStateCallback(keras.callbacks.Callback):
    """Commits `state` at the end of every `batches_per_commit`-th batch and of every epoch.

    What a lost rank costs is the steps since the last commit. A commit copies all variables to host memory
    and asks rank 0, in one small collective, whether the hosts have changed. Its place among the callbacks
    does not matter to `UpdateBatchStateCallback` and `UpdateEpochStateCallback`.

    Args:
        state: the state, of any kind that `hvd.elastic.run` takes; the same settings on all ranks.
        batches_per_commit: batches between two commits, at least 1.

    Raises:
        ValueError: if `batches_per_commit` breaks its rule; when training begins, on every rank alike, if
            `hvd.callbacks.UnevenBatches` is there as well.
    """

    @suggests_keywords
    def __init__(self, state, batches_per_commit: int = 1):
        super().__init__()
        self.state = state
        self.batches_per_commit = require_whole("batches_per_commit", batches_per_commit, 1)
        self.batches_remaining = self.batches_per_commit
        self._seen = 0  # batches of this epoch

    def on_train_begin(self, logs=None):
        hook = hook_of(self.model.optimizer)
        if hook is not None and hook.expects_uneven_batches:
            raise ValueError(
                "`CommitStateCallback` needs equally many batches on all ranks, since every commit is an "
                "exchange: call state.commit() at the end of each epoch instead, after UnevenBatches. "
                f"Received: an optimizer {hook.optimizer.name!r} that expects uneven batches."
            )
        # Ranks that join count from here as well.
        self.batches_remaining = self.batches_per_commit

    def on_epoch_begin(self, epoch, logs=None):
        self._seen = 0

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution` several batches end at once.
        self.batches_remaining -= batch + 1 - self._seen
        self._seen = batch + 1
        if self.batches_remaining <= 0:
            for tracker in self._trackers():
                tracker.batch_done(batch)
            self.state.commit()
            self.batches_remaining = self.batches_per_commit

    def on_epoch_end(self, epoch, logs=None):
        for tracker in self._trackers():
            tracker.epoch_done(epoch)
        self.state.commit()

    def _trackers(self):
        """Those of this `fit`, whose callbacks all share one dict of parameters."""
        trackers = _trackers_of(self.state).values()
        return [tracker for tracker in trackers if tracker.params is self.params]


class UpdateBatchStateCallback(_Tracker):
    """Keeps `state.batch` at the number of batches that are done in the current epoch; 0 between epochs.

    An epoch that was interrupted is finished, not begun anew: the first epoch of `fit` is shortened by the
    `state.batch` batches that were done before, where Keras knows how many it has (`steps_per_epoch`, or
    data of known length); at least one is trained. Which batches these are is the data's affair: `fit` takes
    the first ones of what it is given, so skip `state.batch` batches there if the rest of the epoch is meant.
    After a change of size, `state.batch` counts steps of the old size.

    To end that epoch it sets `model.stop_training` for a moment: list it before callbacks that stop the
    training at an epoch's end, such as `EarlyStopping`.

    Args:
        state: a state with an attribute `batch`.

    Raises:
        ValueError: if the state has no attribute `batch`.
    """

    @suggests_keywords
    def __init__(self, state):
        super().__init__(state)
        _require(state, "batch")
        self._done_before = 0
        self._is_ending = False

    def on_train_begin(self, logs=None):
        super().on_train_begin()
        self._done_before = self.state.batch
        self._is_ending = False

    def batch_done(self, batch):
        self.state.batch = self._done_before + batch + 1

    def on_train_batch_end(self, batch, logs=None):
        self.batch_done(batch)
        steps = self.params.get("steps")
        if self._done_before and steps and self.state.batch >= steps and not self.model.stop_training:
            self.model.stop_training = self._is_ending = True

    def epoch_done(self, epoch):
        self.state.batch = 0

    def on_epoch_end(self, epoch, logs=None):
        self.epoch_done(epoch)
        self._done_before = 0
        if self._is_ending:
            self.model.stop_training = self._is_ending = False


class UpdateEpochStateCallback(_Tracker):
    """Keeps `state.epoch` at the number of epochs that are done, over all calls of `fit`.

    Both ways to go on work: `fit(epochs=total - state.epoch)`, and
    `fit(epochs=total, initial_epoch=state.epoch)`, which shows the right numbers.

    Args:
        state: a state with an attribute `epoch`.

    Raises:
        ValueError: if the state has no attribute `epoch`.
    """

    @suggests_keywords
    def __init__(self, state):
        super().__init__(state)
        _require(state, "epoch")
        self.initial_epoch = state.epoch
        self._first: int | None = None  # Keras' number of the first epoch of this `fit`

    def on_train_begin(self, logs=None):
        super().on_train_begin()
        self.initial_epoch = self.state.epoch
        self._first = None

    def on_epoch_begin(self, epoch, logs=None):
        if self._first is None:
            self._first = epoch

    def epoch_done(self, epoch):
        self.state.epoch = self.initial_epoch + epoch - (self._first or 0) + 1


def _trackers_of(state) -> dict:
    if not hasattr(state, "trackers"):  # one of Horovod's own kinds
        state.trackers = {}
    return state.trackers


def _require(state, name):
    if not hasattr(state, name):
        raise ValueError(
            f"`state` must have an attribute `{name}`: make it with `hvd.elastic.KerasState(..., {name}=0)`. "
            f"Received: {state!r}."
        )
