"""Watches parameter sync: how far the ranks are apart, what exchanges cost, how stale they are."""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.sample_counter import SampleCounter
from hvdext.sync.attachment import attached
from hvdext.sync.engine.engine import Exchanged, Totals
from hvdext.sync.monitor.noise_scale import Rounds, is_defined
from hvdext.sync.monitor.plotting import plot
from hvdext.sync.monitor.records import Records, layer_of
from hvdext.sync.parameter_sync import ParameterSync

_OF_EPOCHS = ("share_waiting", "share_overlapped")  # what TensorBoard gets per epoch, not per exchange


class SyncMonitor(keras.callbacks.Callback):
    """Shows what the model's `ParameterSync` callbacks do: in the logs, in TensorBoard, in a picture.

    At the end of each epoch the logs get these numbers, NaN where nothing was measured:

        sync/exchanges            of this epoch
        sync/divergence           root-mean-square over the ranks of the Euclidean distance to their mean just
                                  before an exchange; mean over the epoch's exchanges
        sync/divergence_max       the largest such distance of any rank
        sync/divergence/<layer>   as sync/divergence, of one layer
        sync/bytes_sent           by this rank for parameter sync, since training began
        sync/bytes_saved          bytes that exchanging the trainable variables' gradients at every step would
                                  have cost, 2(n-1)/n of their size, less all that was sent
        sync/seconds_waiting      of training, for exchanges; sync/share_waiting of the epoch's time
        sync/seconds_overlapped   of exchanges beside training; sync/share_overlapped
        sync/staleness            steps from an exchange's start to its merge, mean; sync/staleness_max
        sync/steps_apart          by how many steps the ranks that met differed, at most
        sync/noise_scale          gradient noise scale in samples: with much smaller batches steps are noisy,
                                  much larger ones hardly help

    Put it before the callbacks that read logs. Its place among syncs does not matter, but that one with
    `EveryEpoch` should come first to count in the same epoch. All ranks need it: they tell each other their
    distances in one small exchange after each exchange of weights, and for nothing else. TensorBoard and the
    picture are rank 0's and show what rank 0 sees: of `Group`, its group.

    Where ranks meet peers (`Pairs`, `Ring`, ...), distances are those to the mean of each rank and its peers.
    What several syncs or fragments exchange is added up, each part as it was at its latest exchange.

    The noise scale is that of McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, averaged over some ten
    exchanges. It needs `Everyone` or `Group`, two ranks or more with different data, a `Mean` in which they
    count alike or `Outer(alpha=0)`, and two exchanges. It is exact for plain SGD with few steps between two
    exchanges, an order of magnitude for other optimizers.

    Args:
        plot: where to write the picture when training ends, a path that ends with ".png".
        tensorboard: a folder for TensorBoard: the numbers of each exchange, over the steps trained.
        prefix: what the names begin with.

    Attributes:
        records: `hvdext.sync.monitor.records.Records`, the numbers of each epoch and curves; None before
            training.

    Raises:
        ValueError: if an argument breaks its rule; when training begins, if there is no sync to watch.
        ImportError: if matplotlib or tensorboard is asked for and not installed.
        RuntimeError: before `hvd.init()`.
    """

    @suggests_keywords
    def __init__(
        self,
        plot: str | Path | None = None,
        tensorboard: str | Path | None = None,
        prefix: str = "sync",
    ):
        super().__init__()
        if plot is not None:
            if Path(plot).suffix.lower() != ".png":
                raise ValueError(f"`plot` must be a path that ends with '.png'. Received: plot={plot!r}.")
            _require("plot", "matplotlib")
        if tensorboard is not None:
            _require("tensorboard", "tensorboard")
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(f"`prefix` must be a word for names in the logs. Received: prefix={prefix!r}.")
        self._plot = None if plot is None else Path(plot)
        self._tensorboard = None if tensorboard is None else str(tensorboard)
        self._prefix = prefix
        self.records: Records | None = None
        self._lock = threading.Lock()  # asynchronous syncs tell of their exchanges in their own threads
        self._watched: list[ParameterSync] = []
        self._is_training = False
        self._comm: Any = None  # a Communicator once training begins
        self._begun: dict[ParameterSync, _Begun] = {}
        self._counter: SampleCounter | None = None
        self._samples_before = 0
        self._bytes_before = (0, 0)
        self._mark = (0.0, 0.0, 0.0)
        self._writer: tf.summary.SummaryWriter | None = None

    # -- Keras' hooks ----------------------------------------------------------------------------------

    def set_model(self, model):
        self._let_go()  # where a fit has died, Keras has not said that it ended
        super().set_model(model)
        self._counter = SampleCounter.of(model)
        self._counter.acquire()
        self._listen()

    def set_params(self, params):
        # The first call after every callback's `set_model`: syncs that come later are attached by now, and
        # have not begun yet.
        super().set_params(params)
        self._listen()

    def on_train_begin(self, logs=None):
        self._comm = current()
        self._listen()
        if not attached(self.model):
            raise ValueError(
                "`SyncMonitor` needs a sync to watch: put hvd.callbacks.ParameterSync, or a preset such as "
                "hvd.sync.LocalSGD(every=8), among the callbacks. "
                f"Received: the model {self.model.name!r} without any."
            )
        self.records = None
        self._is_training = True
        self._samples_before = self._counter.total() if self._counter else 0
        self._bytes_before = self._bytes()
        if self._comm.rank == 0 and self._plot is not None:
            self._plot.parent.mkdir(parents=True, exist_ok=True)
        if self._comm.rank == 0 and self._tensorboard is not None:
            self._writer = tf.summary.create_file_writer(self._tensorboard)

    def on_epoch_begin(self, epoch, logs=None):
        if self.records is None:  # all syncs have begun by now
            with self._lock:
                self._begin()
            self._mark = self._clock()

    def on_epoch_end(self, epoch, logs=None):
        now = self._clock()
        seconds, waited, overlapped = (b - a for a, b in zip(self._mark, now, strict=True))
        self._mark = now
        with self._lock:
            step, trained = self._progress()
            values = self._recording().end_epoch(trained, *self._sent(), seconds, waited, overlapped)
            self._write({name: values[name] for name in _OF_EPOCHS}, step)
        if self._writer is not None:
            self._writer.flush()
        if logs is not None:
            logs.update({f"{self._prefix}/{name}": value for name, value in values.items()})

    def on_train_end(self, logs=None):
        for sync in attached(self.model):
            sync.end()  # so that the last exchanges are seen
        self._let_go()
        if self._plot is not None and self.records is not None and self._comm.rank == 0:
            ranks = "1 rank" if self._comm.size == 1 else f"{self._comm.size} ranks"
            plot(self.records, self._plot, f"Parameter sync of {self.model.name!r}, {ranks}")

    def on_test_begin(self, logs=None):
        if not self._is_training:  # `evaluate` on its own
            self._let_go()

    def on_predict_begin(self, logs=None):
        if not self._is_training:
            self._let_go()

    # -- parts -----------------------------------------------------------------------------------------

    def _listen(self):
        for sync in attached(self.model):
            if sync not in self._watched:
                self._watched.append(sync)
                sync.listen(functools.partial(self._note, sync), measures=True)

    def _begin(self):
        model = self.model
        self._begun = {sync: _Begun(sync) for sync in attached(model) if _totals(sync) is not None}
        layers = [layer_of(p) for sync in self._begun for pieces in sync.fragments for p in pieces]
        gradients = sum(
            math.prod(variable.shape) * tf.as_dtype(variable.dtype).size
            for variable in model.trainable_variables
        )
        n = self._comm.size
        self.records = Records(list(dict.fromkeys(layers)), 2 * (n - 1) / n * gradients)

    def _note(self, sync: ParameterSync, exchanged: Exchanged) -> None:
        """Takes in one exchange; of an asynchronous sync, in its thread."""
        with self._lock:
            begun = self._begun.get(sync)
            if not self._is_training or self.records is None or begun is None:
                return
            trained = exchanged.step + exchanged.staleness - begun.steps
            samples = self._counter.total() - self._samples_before if self._counter else 0
            now = self.records.take(
                exchanged,
                begun.rounds[exchanged.fragment] if begun.rounds else None,
                samples / trained if trained else 0.0,
                trained,
                *self._sent(),
            )
            self._write(
                now | {"seconds": exchanged.seconds, "seconds_waited": exchanged.waited}, exchanged.step
            )

    def _recording(self) -> Records:
        if self.records is None:
            raise RuntimeError("SyncMonitor has not begun: call its `on_train_begin` and `on_epoch_begin`.")
        return self.records

    def _progress(self) -> tuple[int, int]:
        """Steps of the sync that has come farthest: in all, and since training began."""
        steps = [(sync.steps, sync.steps - begun.steps) for sync, begun in self._begun.items()]
        return max(steps, key=lambda pair: pair[1], default=(0, 0))

    def _clock(self) -> tuple[float, float, float]:
        """The time, and for how much of it training has waited for exchanges or they ran beside it."""
        totals = [found for sync in attached(self.model) if (found := _totals(sync)) is not None]
        waited, overlapped = (sum(getattr(t, name) for t in totals) for name in ("waited", "overlapped"))
        return time.perf_counter(), waited, overlapped

    def _bytes(self) -> tuple[int, int]:
        """Sent so far for parameter sync, and for gradients."""
        traffic = self._comm.traffic()
        sync, gradients = (traffic[name].bytes if name in traffic else 0 for name in ("sync", "grad"))
        return sync, gradients

    def _sent(self) -> tuple[int, int]:
        now = self._bytes()
        return now[0] - self._bytes_before[0], now[1] - self._bytes_before[1]

    def _write(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            with self._writer.as_default(step):
                for name, value in values.items():
                    tf.summary.scalar(f"{self._prefix}/{name}", value)

    def _let_go(self):
        with self._lock:
            self._is_training = False
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        if self._counter is not None:
            self._counter.release()
            self._counter = None


class _Begun:
    """A sync that has begun, as it was when training did."""

    def __init__(self, sync: ParameterSync):
        settings = sync.settings
        self.steps = sync.steps
        self.rounds = [Rounds(settings, pieces) for pieces in sync.fragments] if is_defined(settings) else []


def _totals(sync: ParameterSync) -> Totals | None:
    """None if it is attached to the model and has never begun."""
    try:
        return sync.totals
    except RuntimeError:
        return None


def _require(argument, package):
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"`{argument}` needs {package}: pip install 'hvdext[examples]', or {package} alone."
        )
