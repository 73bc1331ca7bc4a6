"""`deploy`: a model that one rank has is loaded on all; its files come to each host once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from hvdext.collectives.arguments import place_of_root
from hvdext.collectives.vocabularies import broadcast_vocabularies
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.failures import raise_on_all
from hvdext.common.arguments import suggests_keywords
from hvdext.inference.deploy import hosts
from hvdext.inference.deploy.manifest import CHUNK_BYTES, Manifest, chunks, describe, kind_of
from hvdext.inference.deploy.model_store import Store, Writer
from hvdext.inference.deploy.relay import number_of_steps, relay
from hvdext.inference.deploy.saved_model import SavedModel


@suggests_keywords
def deploy(
    path: str | os.PathLike,
    *,
    root_rank: int = 0,
    model: keras.Model | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compile: bool = False,
    cache: str | os.PathLike | None = None,
    verbose: int = 1,
) -> keras.Model:
    """Loads a model on every rank from a file that only rank `root_rank` needs to have. Every rank calls it.

    ```python
    model = hvd.deploy("model.keras")
    predictions = hvd.predict(model, x, batch_size=256)
    ```

    The file travels in chunks to one rank of each other host, which checks its SHA-256 and keeps it in the
    user's cache, where the host's other ranks find it, now and the next time. The root's host reads the file
    itself.

    Args:
        path: on the root, a `.keras` file, the folder of a SavedModel, or a `.weights.h5` file; ignored
            elsewhere.
        root_rank: the global rank that has the file.
        model: for weights: the built model that takes them, on every rank; also from a `.keras` file. The
            vocabularies of its layers become those of the root's model.
        custom_objects: classes and functions that a `.keras` file may name, by name.
        compile: whether the model of a `.keras` file is compiled as it was saved, for `evaluate`. To train
            it, see `hvd.load_model`.
        cache: this host's folder for models; None: HVDEXT_CACHE, or hvdext/models in the user's cache.
        verbose: 1: rank 0 shows how far the file has come, and who had it; 0: silent.

    Returns:
        On every rank the model. `.keras` files are loaded with `safe_mode=True`: no code in them is run. Of a
        SavedModel it is the signature `serving_default`, which takes an array or a dict by input name.

    Raises:
        TypeError, ValueError: on every rank alike, if an argument breaks its rule, the ranks' arguments
            differ, or the file is no model that can be loaded.
        OSError: on every rank alike, if the file is not there, a disk is full, or bytes arrive damaged.
        RuntimeError: if `hvd.init()` has not been called.
    """
    comm = current()
    root = _check_arguments(comm, root_rank, model, custom_objects, compile, cache, verbose)
    source = _described(comm, root, path, model)
    place = _delivered(comm, root, source, cache, verbose)
    error, loaded = None, None
    try:
        loaded = _load(place, source.manifest.kind, model, custom_objects, compile)
        if place == Path(source.path):
            source.check_unchanged()
    except Exception as failure:  # loading runs the layers' own code
        error = failure
    raise_on_all(comm, error, f"{source.path} could not be loaded", "hvdext.deploy.loaded")
    assert loaded is not None
    if model is not None:  # a file of weights holds no vocabularies
        broadcast_vocabularies(comm, model, root)
    return loaded


@dataclass(frozen=True)
class _Source:
    """What the root has.

    Attributes:
        path: absolute.
        manifest: what it is.
        times: when each file or folder was last changed, in nanoseconds.
    """

    path: str
    manifest: Manifest
    times: dict[str, int]

    def check_unchanged(self) -> None:
        """Raises a ValueError if the files have been written to since."""
        if _times(self.path) != self.times:
            raise ValueError(f"{self.path!r} has been changed while it was deployed. Deploy it again.")


def _described(comm: Communicator, root: int, path, model: keras.Model | None) -> _Source:
    """The root's file; the same on all ranks."""
    source, error = None, None
    if comm.rank == root:
        try:
            place = os.path.abspath(path)
            kind_of(place)
            times = _times(place)
            source = _Source(place, describe(place), times)
            _check_kind(source, model)
        except (OSError, TypeError, ValueError) as failure:
            error = failure
    raise_on_all(comm, error, f"rank {comm.ranks[root]} has no model to deploy", "hvdext.deploy.found")
    return comm.broadcast_object(source, root, "hvdext.deploy.manifest")


def _delivered(comm: Communicator, root: int, source: _Source, cache, verbose: int) -> Path:
    """Brings the files to every host that lacks them; returns where they are on this one."""
    manifest = source.manifest
    leaders = hosts.leaders(comm.allgather_object(hosts.host_name(), "hvdext.deploy.hosts"), root)
    is_leader = comm.rank == leaders[comm.rank] != root
    place, writer, error = Path(source.path), None, None
    try:
        if is_leader:
            store = Store(cache)
            found = store.find(manifest)
            place, writer = store.path_of(manifest), None if found else store.receive(manifest)
    except (OSError, RuntimeError) as failure:  # a user may have no home
        error = failure
    raise_on_all(comm, error, f"{source.path} cannot be received", "hvdext.deploy.ready")
    everyone = comm.allgather_object((writer is not None, str(place)), "hvdext.deploy.places")
    route = [root, *(rank for rank, (needs, _) in enumerate(everyone) if needs)]
    if len(route) > 1:
        if verbose and comm.rank == 0:
            print(f"{Path(source.path).name}: to {len(route) - 1} of {len(set(leaders))} hosts")
        error = _send(comm, route, source, writer, verbose)
        raise_on_all(comm, error, f"{source.path} has not arrived", "hvdext.deploy.received")
    return Path(everyone[leaders[comm.rank]][1])


def _send(
    comm: Communicator, route: Sequence[int], source: _Source, writer: Writer | None, verbose: int
) -> OSError | None:
    """Sends or receives the files; returns what went wrong on this rank, for which the others do not stop."""
    manifest, failed = source.manifest, list[OSError]()
    parts, count = chunks(source.path, manifest, CHUNK_BYTES), manifest.chunks(CHUNK_BYTES)
    steps = number_of_steps(route, count)
    bar = keras.utils.Progbar(steps, unit_name="chunk") if verbose and comm.rank == 0 else None

    def next_chunk():
        try:
            return b"\0" if failed else next(parts)
        except OSError as failure:
            failed.append(failure)
            return b"\0"  # no SHA-256 will fit

    def take(chunk):
        assert writer is not None
        try:
            if not failed:
                writer.write(chunk)
        except OSError as failure:
            failed.append(failure)

    try:
        with writer or contextlib.nullcontext():
            relay(comm, route, count, next_chunk, take, bar.update if bar else _nothing)
            if failed:
                raise failed[0]
    except OSError as failure:
        return failure
    return None


def _load(place: Path, kind: str, model, custom_objects, compile: bool) -> keras.Model:
    if model is not None:
        model.load_weights(place)
        return model
    if kind == "saved_model":
        return SavedModel(place)
    return keras.models.load_model(place, custom_objects=custom_objects, compile=compile, safe_mode=True)


def _check_arguments(comm: Communicator, root_rank, model, custom_objects, compile, cache, verbose) -> int:
    """The root's place among the ranks."""
    rules = {
        "model": (model is None or isinstance(model, keras.Model), "be a Keras model, or None", model),
        "custom_objects": (
            custom_objects is None or isinstance(custom_objects, Mapping),
            "be a dict of classes and functions by name, or None",
            custom_objects,
        ),
        "compile": (isinstance(compile, bool), "be True or False", compile),
        "cache": (cache is None or isinstance(cache, (str, os.PathLike)), "be a folder, or None", cache),
        "verbose": (verbose in (0, 1), "be 0 or 1", verbose),
    }
    problems = [f"`{k}` must {rule}. Received: {k}={v!r}." for k, (ok, rule, v) in rules.items() if not ok]
    facts = {
        "root_rank": root_rank,
        "model": None if model is None else type(model).__name__,
        "custom_objects": sorted(map(str, custom_objects)) if isinstance(custom_objects, Mapping) else None,
        "compile": compile,
    }
    agreement.check(comm, "hvd.deploy", facts, problems[0] if problems else None)
    return place_of_root(comm, root_rank)


def _check_kind(source: _Source, model: keras.Model | None) -> None:
    kind = source.manifest.kind
    if kind == "weights" and model is None:
        raise ValueError(
            "`model` must be given with weights: the built model that takes them. "
            f"Received: model=None with {source.path!r}."
        )
    if kind == "saved_model" and model is not None:
        raise ValueError(
            "`model` must be None with a SavedModel, which is a whole model. "
            f"Received: a model with {source.path!r}."
        )


def _times(path: str) -> dict[str, int]:
    places = [Path(path), *Path(path).rglob("*")]
    return {str(place): place.stat().st_mtime_ns for place in places}


def _nothing(_) -> None:
    pass
