"""Random rows to try a model with, such as requests might bring: numbers, words, texts, pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from hvdext.serving.worker.signatures import NUMPY_TYPES, Port

Tensors = dict[str, np.ndarray]
_WORDS = ("a", "the", "good", "bad", "red", "house", "runs", "with", "seven", "small", "dogs", "and", "cats")
_LIMITS = (1000, 100, 10, 2)  # of whole numbers
_LENGTHS = (16, 64, 4, 1)  # of open axes
_SIDE = 32  # of a picture, in pixels


@dataclass(frozen=True)
class Way:
    """One way to draw values. Which of them a model takes is found out by trying.

    Attributes:
        texts: "sentences" of one word to many, single words of the "vocabulary", "numbers", or pictures:
            "png", "jpeg".
        below: what whole numbers are less than, where the model does not say.
        length: of axes that are open, except the batch's.
        positive: whether there are no numbers below 0.
    """

    texts: str = "sentences"
    below: int = _LIMITS[0]
    length: int = _LENGTHS[0]
    positive: bool = False

    def draw(
        self, ports: Sequence[Port], generator: np.random.Generator, rows: int, wild: bool = False
    ) -> Tensors:
        """Rows for some inputs, by name.

        Args:
            ports: the inputs.
            generator: of random numbers.
            rows: how many.
            wild: whether they shall be unlike others: larger numbers, longer texts.
        """
        return {one.spec.name: self._values(one, generator, rows, wild) for one in ports}

    def _values(self, one: Port, generator: np.random.Generator, rows: int, wild: bool) -> np.ndarray:
        shape = tuple(
            (self.length if axis else rows) if length is None else length
            for axis, length in enumerate(one.spec.shape)
        )
        dtype = np.dtype(NUMPY_TYPES[one.spec.datatype])
        if dtype.kind == "O":
            texts = np.empty(int(np.prod(shape)), object)
            texts[:] = [self._text(one, generator, wild) for _ in texts]
            return texts.reshape(shape)
        if dtype.kind == "b":
            return generator.random(shape) < 0.5
        if dtype.kind == "f":
            values = generator.random(shape) if self.positive else generator.normal(size=shape)
            return (values * (4 if wild else 1)).astype(dtype)
        if one.words:
            return generator.choice(np.array(one.words), shape).astype(dtype)
        limit = min(one.below or self.below, int(np.iinfo(dtype).max) + 1)
        return generator.integers(0, limit, shape).astype(dtype)

    def _text(self, one: Port, generator: np.random.Generator, wild: bool) -> bytes:
        if self.texts in ("png", "jpeg"):
            encode = tf.io.encode_png if self.texts == "png" else tf.io.encode_jpeg
            return encode(generator.integers(0, 256, (_SIDE, _SIDE, 3)).astype("uint8")).numpy()
        if self.texts == "numbers":
            return str(generator.integers(1, 100)).encode()
        words = [*map(str, one.words)] or _WORDS
        if self.texts == "vocabulary":
            return str(generator.choice(words)).encode()
        count = generator.integers(9, 17) if wild else generator.integers(1, 7)
        return " ".join(generator.choice([*words, *_WORDS], count)).encode()


def ways(ports: Sequence[Port]) -> Iterator[Way]:
    """The ways to draw values for some inputs, the likeliest first."""
    kinds = {np.dtype(NUMPY_TYPES[one.spec.datatype]).kind for one in ports}
    open_axes = any(length is None for one in ports for length in one.spec.shape[1:])
    guessed = any(one.spec.datatype[:3] in ("INT", "UIN") and not (one.words or one.below) for one in ports)
    for length, positive, texts, below in itertools.product(
        _LENGTHS if open_axes else _LENGTHS[:1],
        (False, True) if "f" in kinds else (False,),
        ("sentences", "vocabulary", "numbers", "png", "jpeg") if "O" in kinds else ("sentences",),
        _LIMITS if guessed else _LIMITS[:1],
    ):
        yield Way(texts, below, length, positive)
