"""A model that only one rank has, deployed to ranks on hosts of their own (pretended: each has its cache)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import keras
import numpy as np

from tests.multiprocess.programs.exchange_programs import Program

X = np.random.default_rng(4).normal(size=(5, 8)).astype("float32")
ROOT = 1


def _model():
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(300, activation="tanh"), keras.layers.Dense(300)], name="net"
    )


def _run(hvd):
    """Deployed twice in each form; what the models say, and the bytes that this rank has sent."""
    from hvdext.inference.deploy import deploy, hosts

    folder = Path(tempfile.mkdtemp())
    results = {}
    size, says = None, None
    if hvd.rank() == ROOT:
        model = _model()
        says = model.predict_on_batch(X)
        model.save(folder / "model.keras")
        model.save_weights(folder / "model.weights.h5")
        model.export(folder / "exported", verbose=False)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    try:
        # Four ranks are on three hosts, two of them on the first.
        host = f"host {hvd.rank() * 3 // 4 if hvd.size() == 4 else hvd.rank()}"
        with (
            mock.patch.object(hosts, "host_name", return_value=host),
            mock.patch.object(deploy, "CHUNK_BYTES", 50_000),
        ):
            for turn in range(2):
                before = _bytes(hvd)
                for name in ("model.keras", "model.weights.h5", "exported"):
                    model = hvd.deploy(
                        folder / name if hvd.rank() == ROOT else name,
                        root_rank=ROOT,
                        model=_model() if name == "model.weights.h5" else None,
                        cache=folder / "cache",
                        verbose=0,
                    )
                    results[f"{name} {turn}"] = np.asarray(model(X))
                results[f"sent {turn}"] = _bytes(hvd) - before
            try:
                hvd.deploy(folder / "missing.keras", root_rank=ROOT, verbose=0)
            except FileNotFoundError as error:
                results["error"] = str(error)
        return {"results": results, "size": size, "says": says}
    finally:
        shutil.rmtree(folder)


def _bytes(hvd):
    """Of chunks only: small messages say who needs them."""
    from hvdext.comm.current import current

    return int(current().ledger.entry("hvdext.deploy.chunk", tuple(range(hvd.size()))).sent.numpy())


def _check(ranks):
    size, says = ranks[ROOT]["size"], ranks[ROOT]["says"]
    results = [rank["results"] for rank in ranks]
    for result in results:
        for name in ("model.keras", "model.weights.h5", "exported"):
            for turn in range(2):
                np.testing.assert_allclose(result[f"{name} {turn}"], says, atol=1e-5)
    sent = [(result["sent 0"], result["sent 1"]) for result in results]
    handed_on = {2: [0, size], 4: [0, size, size, 0]}[len(ranks)]  # along 1, 0; along 1, 2, 3
    assert sent == [(bytes_, 0) for bytes_ in handed_on]
    (error,) = {result["error"] for result in results}
    missing = "rank 1 has no model to deploy:\n  rank 1: FileNotFoundError: [Errno 2] There is no model"
    assert error.startswith(missing)


PROGRAMS = {"deployed": Program(_run, _check, sizes=(2, 4))}
