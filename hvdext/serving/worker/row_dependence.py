"""Whether a model's answer to a row depends on the rows that are computed with it, found out by trying.

Random rows are computed in changing company, each at the same place of a batch of the same size, so that
the same numbers come if the company does not matter; then in smaller batches, where sums may be rounded
otherwise.
What differs between two runs of the very same batch, such as what is drawn at random, tells nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hvdext.common.wording import describe, shortened
from hvdext.serving.worker.model_state import ModelState
from hvdext.serving.worker.signatures import Port
from hvdext.serving.worker.trial_rows import Tensors, Way, ways

_MOST_WAYS = 24
_MORE_REPEATS = 5
_ROWS = (5, 2)  # of a trial; fewer where the model takes no more
# Differences that count, in parts of an output's largest number: in batches of one size, and of several.
_SAME_SIZE, _OTHER_SIZE = 1e-4, 5e-2


class WrongRows(RuntimeError):
    """The model gives other numbers of rows than it has been given."""


def why_alone(run: Callable[[Tensors], Tensors], ports: Sequence[Port], state: ModelState) -> str:
    """Why a request's rows must not be computed with others'; empty if they may be.

    Args:
        run: the outputs of a batch, by name; all of them have a row for each of the batch's.
        ports: the inputs.
        state: the model's, which is left as it was.

    Raises:
        WrongRows: as `run` raises it.
        ValueError: if an answer depends on the batches before.
    """
    try:
        trial, problem = _found(run, ports, state)
        if trial is None:
            return f"it takes none of the random rows that it was tried with ({problem})"
        trial.require_no_memory()
        return trial.why_alone()
    finally:
        state.restore()


def _found(run, ports, state) -> tuple[_Trial | None, str]:
    """The first batch that the model takes and answers with other numbers for other rows."""
    best, problem = None, ""
    for rows in _ROWS:
        for way in itertools.islice(ways(ports), _MOST_WAYS):
            generator = np.random.default_rng(rows)
            inputs = way.draw(ports, generator, rows)
            state.restore()
            try:
                outputs = run(inputs)
            except WrongRows:
                raise
            except Exception as error:
                problem = problem or shortened(describe(error), 150, 150)
                continue
            trial = _Trial(run, ports, state, way, generator, inputs, outputs)
            if best is None or trial.telling > best.telling:
                best = trial
            if trial.telling == len(outputs):
                return trial, ""
        if best is not None:
            return best, ""
    return None, problem


class _Trial:
    """A batch, what came of it, and the same rows in other company.

    Args:
        run: see `why_alone`.
        ports: see `why_alone`.
        state: see `why_alone`.
        way: how the rows were drawn.
        generator: what with.
        inputs: the batch.
        outputs: what came of it.
    """

    def __init__(self, run, ports, state, way: Way, generator, inputs: Tensors, outputs: Tensors):
        self._run = run
        self._ports = ports
        self._state = state
        self._way = way
        self._generator = generator
        self._inputs = inputs
        self._outputs = outputs
        self._rows = len(next(iter(outputs.values())))

    @property
    def telling(self) -> int:
        """How many of the outputs are finite and have different rows."""
        return sum(_is_telling(array) for array in self._outputs.values())

    def require_no_memory(self) -> None:
        """Raises ValueError if the same batch gets another answer the second time, and not by chance."""
        self._state.restore()
        self._run(self._inputs)
        self._state.narrow()
        changed = self._state.changed()
        if not changed:
            return
        self._state.restore(only_random=True)
        later = self._run(self._inputs)
        repeated = self._repeated()
        for name, first in self._outputs.items():
            if _distance(first, later[name]) > _limit(first, _distance(first, repeated[name])):
                raise ValueError(
                    "A model that is served must answer the same whatever it has been asked before. "
                    f"Received: one whose output {name!r} depends on {', '.join(map(repr, changed))}, "
                    "which each batch changes."
                )

    def why_alone(self) -> str:
        """See the function of that name."""
        noise = dict.fromkeys(self._outputs, 0.0)
        found = ""
        for repeats in (1, _MORE_REPEATS):  # what is rarely drawn at random may look like a dependence once
            for _ in range(repeats):
                repeated = self._repeated()
                for name, first in self._outputs.items():
                    noise[name] = max(noise[name], _distance(first, repeated[name]))
            found = self._reason(noise)
            if not found:
                return ""
        return found

    def _reason(self, noise: dict[str, float]) -> str:
        every = range(self._rows)
        company = [(list(every[::2]), self._others), (list(every[1::2]), self._others), ([0], self._copies)]
        for kept, others in company:
            found = self._in_company(kept, others, noise)
            if found:
                return found
        for rows in (1, 2):
            if rows < self._rows:
                found = self._in_a_smaller_batch(rows, noise)
                if found:
                    return found
        return ""

    def _repeated(self) -> Tensors:
        self._state.restore()
        return self._run(self._inputs)

    def _batched(self) -> list[tuple[str, np.ndarray]]:
        """The inputs that have a row for each of the batch's."""
        return [(p.spec.name, self._inputs[p.spec.name]) for p in self._ports if p.has_batch]

    def _others(self) -> Iterator[Tensors]:
        """Other rows: first such as are unlike these, which the model may not take, then such as these."""
        for wild in (True, False):
            yield self._way.draw(self._ports, self._generator, self._rows, wild)

    def _copies(self) -> Iterator[Tensors]:
        """The first row again and again."""
        copies = {name: np.repeat(array[:1], self._rows, axis=0) for name, array in self._batched()}
        yield {**self._inputs, **copies}

    def _in_company(
        self, kept: list[int], others: Callable[[], Iterator[Tensors]], noise: dict[str, float]
    ) -> str:
        """What differs for the rows that are kept, where others are beside them."""
        for rows in others():
            mixed = dict(self._inputs)
            for name, array in self._batched():
                mixed[name] = rows[name].copy()
                mixed[name][kept] = array[kept]
            self._state.restore()
            try:
                outputs = self._run(mixed)
            except WrongRows:
                raise
            except Exception:
                continue
            for name, first in self._outputs.items():
                if _is_random(first, noise[name]):
                    continue
                if _distance(first[kept], outputs[name][kept]) > _limit(first, noise[name]):
                    return f"its answer to a row depends on the other rows of the batch (output {name!r})"
            return ""
        return ""

    def _in_a_smaller_batch(self, rows: int, noise: dict[str, float]) -> str:
        self._state.restore()
        batch = {**self._inputs, **{name: array[:rows] for name, array in self._batched()}}
        try:
            outputs = self._run(batch)
        except WrongRows:
            raise
        except Exception as error:
            why = shortened(describe(error), 150, 150)
            return f"it answers {self._rows} rows together, but not {rows} of them ({why})"
        for name, first in self._outputs.items():
            limit = max(_limit(first, noise[name]), _OTHER_SIZE if first.dtype.kind == "f" else 0.01)
            if not _is_random(first, noise[name]) and _distance(first[:rows], outputs[name]) > limit:
                return f"its answer to a row depends on how many rows the batch has (output {name!r})"
        return ""


def _is_telling(array: np.ndarray) -> bool:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return False
    return len(array) < 2 or any(_distance(array[:1], array[i : i + 1]) for i in range(1, len(array)))


def _is_random(array: np.ndarray, noise: float) -> bool:
    return noise > _limit(array, 0.0)


def _limit(array: np.ndarray, noise: float) -> float:
    """The largest distance that may be rounding."""
    if array.dtype.kind != "f":
        return 8 * noise
    return max(8 * noise, _SAME_SIZE, 8 * float(np.finfo(array.dtype).eps))


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """How far two arrays are apart: in parts of their largest number, or how many values differ, in parts."""
    if one.shape != other.shape:
        return np.inf
    if not one.size:
        return 0.0
    if one.dtype.kind != "f":
        return float(np.mean(one != other))
    one, other = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(other)) or not np.array_equal(
        one[~finite], other[~finite], equal_nan=True
    ):
        return np.inf
    one, other = one[finite], other[finite]
    largest = max(np.abs(one).max(initial=0), np.abs(other).max(initial=0))
    return float(np.abs(one - other).max(initial=0) / largest) if largest else 0.0
