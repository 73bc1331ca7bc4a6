"""`hvd.predict`: the predictions of many ranks, in input order."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.failures import on_root, raise_for
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice
from hvdext.common.signals import FinalMessage
from hvdext.inference.predict.following import follow
from hvdext.inference.predict.gathering import Gathering, PredictionFailed, RankLost
from hvdext.inference.predict.output.output_folder import Done, OutputFolder
from hvdext.inference.predict.output.sinks import InMemory, Nowhere, OnDisk
from hvdext.inference.predict.own_methods import (
    OwnMethod,
    arrays_of,
    own_method,
    require_independent_rows,
    rows_alone,
)
from hvdext.inference.predict.preflight import prepare, trace
from hvdext.inference.predict.progress import Progress
from hvdext.inference.predict.sources.raw import RawRows, listed_texts, raw_source
from hvdext.inference.predict.sources.source import Source
from hvdext.inference.predict.sources.sources import DEFAULT_BATCH_SIZE, make_source

VERBOSE = ("auto", 0, 1, 2)


@suggests_keywords
def predict(
    model: keras.Model,
    x: Any,
    batch_size: int | None = None,
    *,
    gather: str = "rank0",
    output: str | os.PathLike | None = None,
    resume: bool = False,
    parse: Callable[[tf.Tensor], Any] | None = None,
    verbose: str | int = "auto",
) -> Any:
    """What `model.predict(x, batch_size)` returns, row by row and bit by bit, computed by all ranks.

    Every rank calls it with the same model, data and arguments, and computes some of the batches; these
    are the ones that `model.predict` would make in one process. Alone, a process does all of them. A model's
    own `predict` is called with the rows of one batch at a time.

        probabilities = hvd.predict(model, images)  # on rank 0; None elsewhere
        hvd.predict(model, "images/", output="probabilities/", resume=True)  # larger than memory

    Args:
        model: whole, with the same weights on every rank; need not be compiled.
        x: arrays or tensors, or nested tuples, lists, dicts of them; a `tf.data.Dataset` of batches; a
            `keras.utils.PyDataset`; a folder of `.npy` files, which are read in the order of their names as
            one long array (of folders named after the inputs, if there are several); with `parse`, a
            folder of TFRecord files. Targets that a data set holds are left out.
        batch_size: rows per batch; default 32. For arrays and folders only.
        gather: who gets the predictions: "rank0" (the others get None) or "all".
        output: a folder for rank 0 to write the predictions to, batch by batch: `predictions.npy`, or
            one file for each output, named after its place. No rank then holds more than a few batches, and
            rank 0 gets arrays that are mapped into memory. The files may be read at any time; their
            headers count the rows that are done.
        resume: go on with what `output` holds of an earlier run that has not come to its end, on any
            number of ranks; begins anew if it holds nothing.
        parse: makes `x`, `(x, y)` or `(x, y, sample_weight)` of one serialized record.
        verbose: rank 0 shows rows, rate and time left of all ranks: "auto" or 1 as a bar (as lines, if it
            does not write to a terminal), 2 as lines; 0 shows nothing.

    Returns:
        Predictions in input order, in the structure of the model's outputs; None on ranks that get none.

    Raises:
        ValueError: on every rank alike, if an argument breaks its rule, ranks differ in model, data or
            arguments, or `output` holds predictions of something else.
        RuntimeError: on every rank alike, or an error of a more fitting class (`ValueError`, `OSError`), if
            the model, the data or the disk fails on one of them; on the others, if a rank is lost, or does
            not call it. The message says which rows are done.
    """
    comm = current()
    source, facts, own = _agreed(comm, model, x, batch_size, gather, output, resume, parse, verbose)
    folder, done = (None, Done()) if output is None else _begin(comm, Path(output), facts, resume)
    sink = _sink(comm, folder, output, gather)
    if not done.is_finished:
        _gather(comm, model, own, source, sink, done, output, verbose, everywhere=gather == "all")
    return sink.result(lambda: _nothing(model, source))


def _agreed(comm: Communicator, model, x, batch_size, gather, output, resume, parse, verbose):
    """The source, and what the predictions depend on; the same on all ranks."""

    def check():
        require_choice("gather", gather, ("rank0", "all"))
        require_choice("verbose", verbose, VERBOSE)
        if output is not None and gather == "all":
            raise ValueError(
                "`gather` must be 'rank0' with `output`, which rank 0 writes; others may open its files. "
                "Received: gather='all'."
            )
        if resume and output is None:
            raise ValueError(
                "`resume` must come with `output`, which it goes on with. Received: output=None."
            )

    settings = {
        "gather": gather,
        "output": None if output is None else os.fspath(output),
        "resume": bool(resume),
    }
    own: OwnMethod | None = None

    def make():
        nonlocal own
        label = own_method(model, "predict")
        if label is None:
            return make_source(x, batch_size=batch_size, parse=parse)
        source = make_source(listed_texts(x), batch_size=batch_size, parse=parse)
        raw = raw_source(source, label, batch_size, x=x)
        wishes: dict[str, Any] = {"verbose": 0}
        if isinstance(raw, RawRows):
            wishes["batch_size"] = batch_size or DEFAULT_BATCH_SIZE
        own = OwnMethod(model, "predict", label, [], {}, wishes)
        return raw

    def build(source):
        return trace(model, source.spec()) if own is None else own(source.example())

    source, facts = prepare(comm, "hvd.predict", model, make, settings, check, build)
    return source, facts, own


def _sink(
    comm: Communicator, folder: OutputFolder | None, output, gather: str
) -> Nowhere | InMemory | OnDisk:
    """What becomes of the predictions on this rank."""
    if folder is not None:
        return OnDisk(folder)
    return InMemory() if output is None and (comm.rank == 0 or gather == "all") else Nowhere()


def _gather(comm, model, own, source, sink, done, output, verbose, everywhere):
    level = verbose if comm.rank == 0 else 0
    progress = Progress("predict", source.rows, source.batches, level, (done.rows, done.batches))
    shared = comm.size > 1 or done.batches > 0
    function, following = _function(comm, model, source, own, shared=shared)
    gathering = Gathering(
        comm,
        function,
        source,
        sink,
        following=following,
        everywhere=everywhere,
        start=done.batches,
        show=lambda rows, batches: progress.update(done.rows + rows, done.batches + batches),
    )

    def state():
        return _state(gathering, sink, done, source, output)

    with FinalMessage(lambda: f"hvd.predict is ended by SIGTERM. {state()}") as last:
        try:
            gathering.run()
        except PredictionFailed as failed:
            raise_for(comm.ranks, failed.everyone, "hvd.predict has failed", failed.own, state())
        except RankLost as error:
            message = f"hvd.predict has lost a rank. {state()}"
            last.say(message)
            raise RankLost(f"{message} This rank was told: {error}") from error
        finally:
            if following is not None:
                following.finish(done.batches + gathering.batches)
    progress.finish(done.rows + gathering.rows)


def _function(comm, model, source, own, *, shared):
    """What a batch is handed to, and what goes on from batch to batch in it."""
    if own is not None:

        def call(given):
            return rows_alone(own(given), given.rows, own.label)

        if shared:
            look = functools.partial(_looked_at, call)
            require_independent_rows(comm, "hvd.predict", own, source, look)
        return call, None
    model.make_predict_function()

    def function(data):
        return model.predict_function([data])

    if not shared:
        return function, None
    example = source.example()
    following = follow(
        comm,
        "hvd.predict",
        model,
        function,
        example,
        trace=functools.partial(_concrete, model, example),
        is_eager=not hasattr(model.predict_function, "get_concrete_function"),
    )
    return function, following


def _looked_at(call, given):
    return arrays_of(call(given))


def _concrete(model, example):
    """The function that runs for a batch like `example`."""
    function = model.predict_function
    if not hasattr(function, "get_concrete_function"):  # runs eagerly
        function = tf.function(function, autograph=False)
    return function.get_concrete_function([example])


def _begin(comm: Communicator, path: Path, facts: dict, resume: bool) -> tuple[OutputFolder | None, Done]:
    """Rank 0's folder, and how far it has come, on every rank."""
    opened: list[OutputFolder] = []

    def open_folder():
        opened.append(OutputFolder(path, facts, resume=resume))
        return opened[0].done

    done = on_root(comm, open_folder, 0, "hvd.predict cannot write its predictions", "hvdext.predict.begin")
    return opened[0] if opened else None, done


def _state(gathering, sink, done, source, output):
    """Which rows are done, and how to go on."""
    if output is None:
        rows = gathering.rows
        kept = "" if rows == 0 else " but are lost; `output=` would have kept them"
        return f"{_rows(rows, source)} were done{kept}."
    rows = max(gathering.rows_kept, sink.rows_kept, done.rows)
    return (
        f"{_rows(rows, source)} are done and kept in {os.fspath(output)!r}; "
        f"the same call with resume=True goes on from row {rows}."
    )


def _rows(rows, source):
    total = "" if source.rows is None else f" of {source.rows}"
    return f"No rows{total}" if rows == 0 else f"Rows 0 to {rows - 1}{total}"


def _nothing(model: keras.Model, source: Source) -> Any:
    """The symbolic outputs, where there are no rows."""
    spec = source.spec()
    if spec is None:
        raise ValueError(
            "`x` must have a batch, to know what is predicted. Received: a PyDataset without any."
        )
    return trace(model, spec)
