"""What a pipeline's model does with files: all ranks together write and read the whole model."""

from __future__ import annotations

import os
from typing import Any

from hvdext.keras_tools import training
from hvdext.placement.pipeline.first_batch import FirstBatch
from hvdext.placement.pipeline.preflight import require_all_call
from hvdext.placement.pipeline.whole_model import WholeModel


class Files:
    """The methods of a pipeline's model for files; comes before `keras.Model` among the bases of a class."""

    whole: WholeModel
    compiled: bool
    optimizer: Any
    _first_batch: FirstBatch

    def save(self, filepath: str | os.PathLike, overwrite: bool = True, **options) -> None:
        """Writes the whole model, with the optimizer's state, as one file that opens in plain Keras.

        Every rank calls it; the first one gathers the weights, which takes as much memory as the whole model
        and its optimizer, and writes. Callbacks such as `keras.callbacks.ModelCheckpoint` do so on all ranks.

        Raises:
            OSError: on every rank alike, if the file cannot be written.
            ValueError: on every rank alike, if Keras does not take an argument.
            RuntimeError: within AsOneProcess, where one rank would wait for the others.
        """
        require_all_call(self.whole.everyone)
        self.whole.save(filepath, self, overwrite=overwrite, **options)

    def save_weights(self, filepath: str | os.PathLike, overwrite: bool = True, **options) -> None:
        """Writes the whole model's weights and, once there is one, the optimizer's state, as Keras does.

        As `save` otherwise.
        """
        require_all_call(self.whole.everyone)
        self.whole.save_weights(filepath, self, overwrite=overwrite, **options)

    def load_weights(self, filepath: str | os.PathLike, **options) -> None:
        """Reads this rank's weights from a file with the whole model's (`.keras` or `.weights.h5`).

        Every rank calls it. As in Keras, the state of a built optimizer is read, too, if the file has it.

        Raises:
            OSError: on every rank alike, if a rank cannot read the file.
            ValueError: on every rank alike, if it is of another kind, or of another model.
            RuntimeError: as `save`.
        """
        require_all_call(self.whole.everyone)
        has_state = self.compiled and self.optimizer is not None and self.optimizer.built
        self.whole.load_weights(filepath, self.optimizer if has_state else None, **options)

    def load_checkpoint(self, filepath: str | os.PathLike) -> None:
        """Reads this rank's weights and optimizer state from a file of the whole model.

        `save`, `save_weights` or plain Keras has written it. Every rank calls it. The model must be compiled,
        with an optimizer of the same kind.

        Raises:
            OSError: on every rank alike, if a rank cannot read the file.
            ValueError: if the model is not compiled; on every rank alike, if the file is of another kind or
                of another model, or holds no such optimizer's state.
            RuntimeError: as `save`.
        """
        require_all_call(self.whole.everyone)
        training.require_compiled(self, "load_checkpoint")
        self._first_batch.build_optimizer(self)
        self.whole.load_checkpoint(filepath, self.optimizer)

    def get_config(self):
        """Refuses: a rank has its own stages only.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A pipeline's model has no configuration of its own: its method `save`, called by all ranks, "
            "writes the whole model, as plain Keras opens it."
        )

    def quantize(self, mode=None, *args, **kwargs) -> None:
        """Refuses: files of the whole model need layers as they were cut.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A pipeline's model must be quantized before it is cut, or after it was saved: save it, open the "
            f"file in plain Keras and quantize that. Received: mode={mode!r}."
        )

    def export(self, filepath: str | os.PathLike, *args, **kwargs) -> None:
        """Refuses: what is exported runs in one process.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A pipeline's model must be exported from its file: save it, open the file in plain Keras and "
            f"export that. Received: filepath={str(filepath)!r}."
        )
