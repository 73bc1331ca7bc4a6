"""What a monitor remembers of exchanges: the numbers of each epoch, and curves over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hvdext.keras_tools.selection import path_of
from hvdext.sync.engine.engine import Exchanged
from hvdext.sync.engine.report import FINITE, STEP
from hvdext.sync.monitor.noise_scale import NoiseScale, Rounds
from hvdext.sync.pieces import Piece


class Curve:
    """Points (x, y), evenly thinned out as they become many.

    Args:
        limit: how many points are kept at most, an even number.
    """

    def __init__(self, limit: int = 2000):
        self._limit = limit
        self._stride, self._seen = 1, 0
        self.x: list[float] = []
        self.y: list[float] = []

    def add(self, x: float, y: float) -> None:
        """Adds a point, or leaves it out."""
        if self._seen % self._stride == 0:
            if len(self.x) == self._limit:
                del self.x[1::2], self.y[1::2]
                self._stride *= 2
            self.x.append(x)
            self.y.append(y)
        self._seen += 1


class Tally:
    """The mean and the largest of some numbers; NaN of none."""

    def __init__(self) -> None:
        self.count, self._sum, self.largest = 0, 0.0, math.nan

    def add(self, value: float) -> None:
        """Takes in one more."""
        self.count += 1
        self._sum += value
        self.largest = max(value, self.largest) if self.count > 1 else value

    @property
    def mean(self) -> float:
        """Their mean."""
        return self._sum / self.count if self.count else math.nan


class Distances:
    """How far each rank was from the mean, as of the latest exchange of each piece."""

    def __init__(self) -> None:
        self._latest: dict[str, dict[tuple, dict[int, float]]] = {}  # layer, piece, rank: squared distance

    def take(self, exchanged: Exchanged) -> tuple[np.ndarray, dict[str, float]]:
        """Takes in an exchange that has measured distances.

        Returns:
            The distances of all ranks that have met, over everything exchanged so far, and each of its
            layers' root-mean-square distance over these ranks.
        """
        outcome, pieces = exchanged.outcome, exchanged.pieces
        assert outcome.squares is not None
        met = [i for i, row in enumerate(outcome.table) if row[FINITE]]
        ranks = [outcome.ranks[i] for i in met]
        for j, piece in enumerate(pieces):
            pieces_of_layer = self._latest.setdefault(layer_of(piece), {})
            ranks_of_piece = pieces_of_layer.setdefault((id(piece.variable), piece.start, piece.stop), {})
            ranks_of_piece.update({outcome.ranks[i]: float(outcome.squares[i, j]) for i in met})
        squares = {layer: self._by_rank(layer, ranks) for layer in self._latest}
        touched = {layer_of(piece) for piece in pieces}
        layers = {layer: float(np.sqrt(np.mean(squares[layer]))) for layer in squares if layer in touched}
        return np.sqrt(np.sum(list(squares.values()), axis=0)), layers

    def _by_rank(self, layer, ranks):
        found = self._latest[layer].values()
        return np.array([sum(piece.get(rank, 0.0) for piece in found) for rank in ranks])


class _Epoch:
    """What exchanges have shown since the epoch began."""

    def __init__(self) -> None:
        self.divergence, self.farthest = Tally(), Tally()
        self.layers: dict[str, Tally] = {}
        self.staleness, self.steps_apart = Tally(), Tally()


class Records:
    """What exchanges have shown since training began.

    Args:
        layers: the layers that are exchanged.
        synchronous: bytes that a rank would send at each step if gradients were exchanged.

    Attributes:
        divergence: curve of the ranks' root-mean-square distance to their mean.
        farthest: curve of the largest distance.
        layers: curves of each layer's root-mean-square distance.
        sent: curve of the bytes sent so far, for gradients as well.
        synchronous: curve of the bytes that would have been.
        noise_scale: curve, in samples.
        staleness: curve, in steps.
        epochs: what `end_epoch` has returned.
    """

    def __init__(self, layers: Sequence[str], synchronous: float):
        self._per_step = synchronous
        self.divergence, self.farthest = Curve(), Curve()
        self.sent, self.synchronous = Curve(), Curve()
        self.noise_scale, self.staleness = Curve(), Curve()
        self.layers = {layer: Curve() for layer in layers}
        self.epochs: list[dict[str, float]] = []
        self._distances, self._noise = Distances(), NoiseScale()
        self._epoch = _Epoch()

    def take(
        self,
        exchanged: Exchanged,
        rounds: Rounds | None,
        batch: float,
        trained: int,
        sent: int,
        gradients: int,
    ) -> dict[str, float]:
        """Takes in one exchange.

        Args:
            exchanged: the exchange.
            rounds: of its fragment, where there is a noise scale.
            batch: samples per step and rank.
            trained: steps so far.
            sent: bytes so far.
            gradients: bytes sent for gradients besides.

        Returns:
            What is known now, by name.
        """
        epoch, step, merged = self._epoch, exchanged.step, exchanged.step + exchanged.staleness
        now: dict[str, float] = {}
        if exchanged.outcome.squares is not None and exchanged.outcome.table[:, FINITE].any():
            distances, layers = self._distances.take(exchanged)
            now["divergence"] = float(np.sqrt(np.mean(np.square(distances))))
            now["divergence_max"] = float(distances.max())
            epoch.divergence.add(now["divergence"])
            epoch.farthest.add(now["divergence_max"])
            self.divergence.add(step, now["divergence"])
            self.farthest.add(step, now["divergence_max"])
            for layer, distance in layers.items():
                now[f"divergence/{layer}"] = distance
                epoch.layers.setdefault(layer, Tally()).add(distance)
                self.layers[layer].add(step, distance)
            if rounds is not None and (found := rounds.end(exchanged, batch)) is not None:
                self._noise.add(rounds, *found)
        now |= self._bytes(trained, sent, gradients)
        self.sent.add(merged, sent + gradients)
        self.synchronous.add(merged, self._per_step * trained)
        now["staleness"] = float(exchanged.staleness)
        now["steps_apart"] = float(np.ptp(exchanged.outcome.table[:, STEP]))
        epoch.staleness.add(now["staleness"])
        epoch.steps_apart.add(now["steps_apart"])
        self.staleness.add(step, now["staleness"])
        if not math.isnan(self._noise.value):
            now["noise_scale"] = self._noise.value
            self.noise_scale.add(step, self._noise.value)
        return now

    def end_epoch(
        self, trained: int, sent: int, gradients: int, seconds: float, waited: float, overlapped: float
    ) -> dict[str, float]:
        """Ends an epoch.

        Args:
            trained: steps so far.
            sent: bytes so far.
            gradients: bytes sent for gradients besides.
            seconds: that the epoch took.
            waited: seconds of them that training waited for exchanges.
            overlapped: seconds of them that exchanges ran beside training.

        Returns:
            The epoch's numbers by name, the same names every time.
        """
        epoch, self._epoch = self._epoch, _Epoch()
        found = {
            "exchanges": float(epoch.staleness.count),
            "divergence": epoch.divergence.mean,
            "divergence_max": epoch.farthest.largest,
            **{f"divergence/{layer}": epoch.layers.get(layer, Tally()).mean for layer in self.layers},
            **self._bytes(trained, sent, gradients),
            "seconds_waiting": waited,
            "seconds_overlapped": overlapped,
            "share_waiting": waited / seconds if seconds > 0 else 0.0,
            "share_overlapped": overlapped / seconds if seconds > 0 else 0.0,
            "staleness": epoch.staleness.mean,
            "staleness_max": epoch.staleness.largest,
            "steps_apart": epoch.steps_apart.largest,
            "noise_scale": self._noise.value,
        }
        self.epochs.append(found)
        return found

    def _bytes(self, trained, sent, gradients):
        saved = self._per_step * trained - sent - gradients
        return {"bytes_sent": float(sent), "bytes_saved": float(saved)}


def layer_of(piece: Piece) -> str:
    """The path of what a piece's variable belongs to."""
    parent, _, name = path_of(piece.variable).rpartition("/")
    return parent or name
