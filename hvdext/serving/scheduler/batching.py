"""Dynamic batching: which of the waiting rows go to the model together, and when. Pure: times are passed in.

A request with more rows than a batch holds is cut into parts; every other request is one part. Parts whose
rows have equal shapes wait in one line. A batch leaves when `max_rows` wait in a line or the oldest part has
waited for `max_delay`, and takes whole parts from the front while they fit. A part that failed in company
runs alone the next time, before all others. A request of a model whose rows depend on each other is one
part, which leaves at once and by itself.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hvdext.serving.service import DEFAULT_SIGNATURE, InvalidRequest

Tensors = dict[str, np.ndarray]


@dataclass(eq=False)
class Request:
    """Rows that a client wants answers for, as one.

    Attributes:
        inputs: by name, with `rows` rows each.
        rows: 1 or more.
        key: equal for requests whose rows have equal shapes, and that may be computed together.
        answer: called once, with the outputs or with what went wrong.
        signature: which of the model's.
        apart: never computed together with another, nor cut.
        done: True once it has been answered or dropped; its parts are of no further use.
    """

    inputs: Mapping[str, np.ndarray]
    rows: int
    key: tuple
    answer: Callable[[Tensors | Exception], None]
    signature: str = DEFAULT_SIGNATURE
    apart: bool = False
    done: bool = False
    parts: list[Part] = field(default_factory=list)

    def finish(self, result: Tensors | Exception) -> None:
        """Answers it, unless it has been answered already."""
        if not self.done:
            self.done = True
            self.answer(result)

    def part_done(self, part: Part, outputs: Tensors) -> None:
        """Keeps a part's outputs; the last one answers the request."""
        part.outputs = outputs
        pieces = [part.outputs for part in self.parts if part.outputs is not None]
        if len(pieces) == len(self.parts):
            self.finish(self._differing(pieces) or _joined(pieces))

    def _differing(self, pieces: Sequence[Tensors]) -> InvalidRequest | None:
        """Outputs may be as wide as what is longest in their batch: those of two batches make no array."""
        for name in pieces[0]:
            shapes = sorted({piece[name].shape[1:] for piece in pieces})
            if len(shapes) > 1:
                most = self.parts[0].rows
                return InvalidRequest(
                    f"Output {name!r} has rows of shape {shapes[0]} in one part of the request and "
                    f"{shapes[-1]} in another, which cannot be joined: send at most {most} rows. "
                    f"Received: {self.rows}."
                )
        return None


@dataclass(eq=False)
class Part:
    """Rows of one request that go to the model together.

    Attributes:
        request: whose.
        start: the first of its rows.
        rows: how many.
        since: when it began to wait, on the caller's clock.
        alone: it failed in company, so it runs alone.
        losses: how many ranks were lost while they computed it.
        outputs: the model's, once they are there.
    """

    request: Request
    start: int
    rows: int
    since: float
    alone: bool = False
    losses: int = 0
    outputs: Tensors | None = None

    @property
    def inputs(self) -> Tensors:
        """Its rows of the request's inputs; no copy."""
        rows = slice(self.start, self.start + self.rows)
        return {name: array[rows] for name, array in self.request.inputs.items()}


def make_request(
    inputs: Mapping[str, np.ndarray],
    max_rows: int,
    now: float,
    answer: Callable[[Tensors | Exception], None],
    signature: str = DEFAULT_SIGNATURE,
    alone: str = "",
) -> Request:
    """A request and its parts, of at most `max_rows` rows each.

    Args:
        inputs: by name.
        max_rows: of a part.
        now: the time.
        answer: see `Request`.
        signature: see `Request`.
        alone: why it is computed by itself; empty: it may go with others.

    Raises:
        InvalidRequest: if it is computed by itself and has more rows than that.
    """
    rows = len(next(iter(inputs.values())))
    key: tuple = (signature, *((name, array.shape[1:]) for name, array in sorted(inputs.items())))
    request = Request(inputs, rows, key, answer, signature, apart=bool(alone))
    if alone:
        request.key = (*key, id(request))
        if rows > max_rows:
            raise InvalidRequest(
                f"A request to this model may have at most {max_rows} rows, which are computed together and "
                f"by themselves: {alone}. Received: {rows}."
            )
    starts = range(0, rows, max_rows)
    request.parts = [Part(request, start, min(max_rows, rows - start), now) for start in starts]
    return request


class Waiting:
    """The parts that wait for one version of a model.

    Args:
        max_rows: of a batch.
        max_delay: seconds that a part may wait for others to join it.
    """

    def __init__(self, max_rows: int, max_delay: float):
        self.max_rows = max_rows
        self.max_delay = max_delay
        self.rows = 0
        self._alone: deque[Part] = deque()
        # Keys are shapes of rows; parts are keys too: dropping one from the middle takes no search.
        self._lines: dict[tuple, OrderedDict[Part, None]] = {}
        self._rows_in: dict[tuple, float] = {}  # infinite where nothing is waited for

    def __len__(self) -> int:
        return len(self._alone) + sum(map(len, self._lines.values()))

    def put(self, part: Part) -> None:
        """Adds a part at the end of its line."""
        self.rows += part.rows
        if part.alone:
            self._alone.append(part)
            return
        key = part.request.key
        self._lines.setdefault(key, OrderedDict())[part] = None
        self._rows_in[key] = self._rows_in.get(key, 0) + (math.inf if part.request.apart else part.rows)

    def drop(self, part: Part) -> bool:
        """Removes a part; False if it does not wait here."""
        if part.alone:
            if part not in self._alone:
                return False
            self._alone.remove(part)
            self.rows -= part.rows
            return True
        key = part.request.key
        if part not in self._lines.get(key, ()):
            return False
        self._remove(key, part)
        return True

    def drop_all(self) -> list[Part]:
        """Removes and returns all parts."""
        parts = [*self._alone, *(part for line in self._lines.values() for part in line)]
        self._alone.clear()
        self._lines.clear()
        self._rows_in.clear()
        self.rows = 0
        return parts

    @property
    def full(self) -> bool:
        """True if a batch waits that need not wait for more rows."""
        return bool(self._alone) or any(rows >= self.max_rows for rows in self._rows_in.values())

    def due_at(self) -> float | None:
        """When the next batch is to leave; in the past if it is overdue, None if nothing waits."""
        if self._alone:
            return self._alone[0].since
        since = [next(iter(line)).since for line in self._lines.values()]
        if not since:
            return None
        return min(since) + (0.0 if self.full else self.max_delay)

    def take(self) -> list[Part]:
        """Removes and returns the parts of the next batch; nothing waits: an empty list."""
        if self._alone:
            part = self._alone.popleft()
            self.rows -= part.rows
            return [part]
        key = self._next_line()
        if key is None:
            return []
        parts: list[Part] = []
        rows = 0
        for part in self._lines[key]:
            if rows + part.rows > self.max_rows:
                break
            parts.append(part)
            rows += part.rows
        for part in parts:
            self._remove(key, part)
        return parts

    def _next_line(self):
        """A line that has waited too long goes before a full one, so that rare shapes have their turn."""

        def order(key):
            return next(iter(self._lines[key])).since

        full = [key for key, rows in self._rows_in.items() if rows >= self.max_rows]
        oldest = min(self._lines, key=order, default=None)
        if oldest is None or not full:
            return oldest
        first_full = min(full, key=order)
        return oldest if order(oldest) + self.max_delay <= order(first_full) else first_full

    def _remove(self, key, part):
        line = self._lines[key]
        del line[part]
        self.rows -= part.rows
        self._rows_in[key] -= part.rows
        if not line:
            del self._lines[key], self._rows_in[key]


def padded_rows(rows: int, sizes: Sequence[int]) -> int:
    """The smallest allowed size that holds `rows`; without sizes, `rows` itself."""
    return min((size for size in sizes if size >= rows), default=rows)


def joined_inputs(parts: Sequence[Part], rows: int) -> Tensors:
    """The batch of some parts, filled up to `rows` by repeating the last row."""
    batch = _joined([part.inputs for part in parts])
    missing = rows - sum(part.rows for part in parts)
    if not missing:
        return batch
    return {
        name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for name, array in batch.items()
    }


def cut_outputs(outputs: Tensors, parts: Sequence[Part]) -> list[Tensors]:
    """Each part's rows of a batch's outputs; the rows of the padding fall away."""
    start, cut = 0, []
    for part in parts:
        cut.append({name: array[start : start + part.rows] for name, array in outputs.items()})
        start += part.rows
    return cut


def _joined(pieces: Sequence[Tensors]) -> Tensors:
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
