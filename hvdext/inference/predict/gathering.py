"""The rounds of a prediction: compute, exchange in the background, keep.

Every rank must call `Gathering.run`, with a source of the same batches. While one round travels, the next one
is computed; no rank is ever more than a round ahead. All ranks read the same reports in the same
order, and decide by them alone how long the next runs are, when it is over, and whether it has failed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import keras

from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import Told, told
from hvdext.common.background import Background
from hvdext.inference.predict import values
from hvdext.inference.predict.following import Following
from hvdext.inference.predict.parts import Part, Report, exchange
from hvdext.inference.predict.rounds import Pace, Run, next_runs
from hvdext.inference.predict.sources.source import Source, order_problem

ROUND = "hvdext.predict.round"
END = "hvdext.predict.end"
KEPT = "hvdext.predict.kept"


class Sink(Protocol):
    """What becomes of the predictions on one rank. Called from one thread, round by round."""

    rows_kept: int

    def take(self, parts: Sequence[Part]) -> None:
        """Keeps all ranks' parts of a round, which come in input order."""


class PredictionFailed(Exception):
    """A rank has failed; raised on every rank, for the caller to turn into the error that users see.

    Args:
        everyone: what each rank told of its failure, in rank order; None of one that has not failed.
        own: this rank's error.
    """

    def __init__(self, everyone: Sequence[Told | None], own: Exception | None):
        super().__init__(everyone)
        self.everyone = everyone
        self.own = own


class RankLost(RuntimeError):
    """The exchange with the other ranks has failed."""


class Gathering:
    """One prediction on all ranks.

    Args:
        comm: all of them.
        predict: what a batch is handed to; returns any structure of tensors.
        source: the batches.
        sink: of this rank.
        following: what goes on from batch to batch; None: nothing does, or they all run here.
        everywhere: whether all ranks receive the predictions.
        start: the first batch to compute.
        show: called on every rank with the rows and batches that have arrived in this run.

    Attributes:
        rows, batches: that have arrived so far, in this run.
        rows_kept: that rank 0 has kept for sure, with those of earlier runs.
    """

    def __init__(
        self,
        comm: Communicator,
        predict: Callable[[Any], Any],
        source: Source,
        sink: Sink,
        *,
        following: Following | None = None,
        everywhere: bool,
        start: int = 0,
        show: Callable[[int, int], None] = lambda rows, batches: None,
    ):
        self._comm = comm
        self._predict = predict
        self._source = source
        self._sink = sink
        self._following = following
        self._everywhere = everywhere
        self._start = start
        self._show = show
        self._pace = Pace(comm.size)
        self._pending: deque[Future] = deque()  # rounds on their way: the reports of all ranks
        self._failure: tuple[Told, Exception] | None = None  # this rank's own
        self._has_ended = False
        self.rows = 0
        self.batches = 0
        self.rows_kept = sink.rows_kept

    def run(self) -> None:
        """Computes and keeps everything.

        Raises:
            PredictionFailed: on every rank alike, if a rank has failed.
            RankLost: if a rank is gone.
        """
        background = Background("hvdext-predict")
        try:
            self._run(background)
        finally:
            background.stop()
        self._check_end()
        self._hear_last_reports()

    def _run(self, background):
        position = self._start
        while not self._has_ended and (self._source.batches is None or position < self._source.batches):
            runs = next_runs(position, self._source.batches, self._comm.size, self._pace.limit)
            part = self._compute(runs[self._comm.rank])
            self._pending.append(background.submit(self._deliver, part))
            position = runs[-1].stop
            # The first round is waited for: it shows how large the predictions are.
            if len(self._pending) > 1 or runs[0].start == self._start:
                self._receive()
        while self._pending:
            self._receive()

    def _compute(self, run: Run) -> Part:
        """This rank's part of a round; what goes wrong here travels in it, since the others wait for it."""
        report = Report(rows_kept=self._sink.rows_kept)
        if self._failure is not None:
            report.error = self._failure[0]
            return Part(report)
        start = time.perf_counter()
        computed: list[Any] = []
        try:
            if self._following is not None:
                self._following.go_to(run.start)
            for data, rows in self._source.read(run.start, run.stop):
                computed.append(self._predict(data))
                report.rows += rows
            if self._following is not None:
                self._following.check(run.start + len(computed))
            outputs = self._collected(computed)
        except Exception as error:
            self._fail(f"batch {run.start + len(computed)}", error)
            return self._compute(run)
        report.batches = len(computed)
        report.has_ended = len(computed) < len(run)
        report.structure = values.skeleton(computed[0]) if computed else None
        report.size = sum(value.nbytes for output in outputs for value in output)
        report.seconds = time.perf_counter() - start
        return Part(report, outputs)

    @staticmethod
    def _collected(computed):
        """For each output its values in the order of the batches, as few as possible."""
        flat = [[values.of_tensor(tensor) for tensor in keras.tree.flatten(outputs)] for outputs in computed]
        return [values.merged(output) for output in zip(*flat, strict=True)]

    def _deliver(self, part: Part) -> list[Report]:
        """Exchanges a round and keeps it; in the background. Returns what all ranks hear of it."""
        parts = exchange(self._comm, part, ROUND, everywhere=self._everywhere)
        reports = [part.report for part in parts]
        if self._failure is None and all(report.error is None for report in reports):
            try:
                self._sink.take(parts)
            except Exception as error:
                self._fail("keeping the predictions", error)
        return reports

    def _fail(self, what, error):
        self._failure = (told(error, what), error)

    def _receive(self):
        """Waits for the oldest round and draws the conclusions, the same on every rank."""
        oldest = self._pending.popleft()
        try:
            reports = oldest.result()
        except Exception as lost:
            raise RankLost(str(lost)) from lost
        self.rows_kept = max(self.rows_kept, reports[0].rows_kept)
        self._raise_reported([report.error for report in reports])
        found = [report.batches for report in reports]
        self._has_ended = self._has_ended or any(report.has_ended for report in reports)
        self._pace.observe(found, [r.size for r in reports], [r.seconds for r in reports])
        self.rows += sum(report.rows for report in reports)
        self.batches += sum(found)
        self._show(self.rows, self.batches)

    def _check_end(self):
        """Of data of unknown length each rank has looked for its own batches only."""
        if self._failure is None:
            end = self._start + self.batches
            try:
                self._source.end()
                if self._source.batches is None and not self._source.ends_at(end):
                    raise ValueError(f"the data has other batches here than the {end} of all ranks together")
            except Exception as error:
                self._fail("the end", error)

    def _hear_last_reports(self):
        """What rank 0 could not write may only show after the last round."""
        mine = None if self._failure is None else self._failure[0]
        try:
            everyone = self._comm.allgather_object((mine, list(self._source.landmarks)), END)
        except Exception as lost:
            raise RankLost(str(lost)) from lost
        self._raise_reported([error for error, _ in everyone])
        problem = order_problem([landmarks for _, landmarks in everyone])
        if problem is not None:
            self._give_up([told(ValueError(problem))] * len(everyone))

    def _raise_reported(self, errors):
        if any(error is not None for error in errors):
            self._give_up(errors)

    def _give_up(self, errors):
        """Raises what all ranks raise, once nothing is on its way and rank 0 has said what it keeps."""
        try:
            for one in self._pending:
                one.result()
            self.rows_kept = self._comm.broadcast_object(self._sink.rows_kept, 0, KEPT)
        except Exception as lost:
            raise RankLost(str(lost)) from lost
        raise PredictionFailed(errors, self._failure[1] if self._failure else None)
