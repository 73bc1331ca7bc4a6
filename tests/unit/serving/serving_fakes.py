"""A service that computes real numbers with NumPy in the thread of the event loop."""

import asyncio

import numpy as np

from hvdext.serving import service as s
from hvdext.serving.protocols.tensors import DTYPES


def signature(inputs, outputs):
    return s.Signature(
        tuple(s.TensorSpec(name, *spec) for name, spec in inputs.items()),
        tuple(s.TensorSpec(name, *spec) for name, spec in outputs.items()),
    )


def scale(factor):
    described = signature({"x": ("FP32", (None, 3))}, {"y": ("FP32", (None, 3))})
    return described, lambda inputs: {"y": inputs["x"] * np.float32(factor)}


def mixed():
    """Three inputs of different datatypes and ranks."""
    described = signature(
        {"ids": ("INT64", (None,)), "image": ("UINT8", (None, 2, 2)), "text": ("BYTES", (None, 1))},
        {"ids": ("INT64", (None,)), "total": ("FP64", (None,)), "upper": ("BYTES", (None, 1))},
    )

    def compute(inputs):
        upper = np.empty(inputs["text"].shape, object)
        upper.flat = [value.upper() for value in inputs["text"].flat]
        total = inputs["image"].sum(axis=(1, 2), dtype=np.float64) / 8
        return {"ids": inputs["ids"], "total": total, "upper": upper}

    return described, compute


def echo(datatype):
    spec = {"x": (datatype, (None, None))}
    return signature(spec, {"y": spec["x"]}), lambda inputs: {"y": inputs["x"]}


def inverse():
    """Infinite at 0."""

    def compute(inputs):
        with np.errstate(divide="ignore", invalid="ignore"):
            return {"y": 1 / inputs["x"]}

    return signature({"x": ("FP32", (None,))}, {"y": ("FP32", (None,))}), compute


def raising(error):
    def compute(inputs):
        raise error

    return signature({"x": ("FP32", (None,))}, {"y": ("FP32", (None,))}), compute


class FakeService:
    """Models by name and version; "repository" adds versions that `load` brings in.

    `others` holds models by name and by the name of another signature than the default.
    """

    def __init__(self, models=None, repository=None, others=None):
        if models is None:
            models = {("scale", 1): scale(2), ("scale", 2): scale(3), ("mixed", 1): mixed()}
        self.models = dict(models)
        self.stored = repository or {}
        self.others = others or {}
        self.states = {}
        self.live = self.ready = True
        self.timeouts = []
        self.gate = None  # an asyncio.Event that holds the answers back
        self.cancelled = 0
        self.waiting = 0

    def versions(self):
        return [self._version(*key) for key in sorted(self.models)]

    def _version(self, name, number):
        state, reason = self.states.get((name, number), (s.State.READY, ""))
        described = None if state is s.State.LOADING else self.models[name, number][0]
        ranks = (0, 1) if state is s.State.READY else ()
        others = {called: one[0] for (of, called), one in self.others.items() if of == name}
        return s.ModelVersion(name, number, state, reason, described, "0" * 64, "keras", ranks, others)

    def find(self, name, version=None):
        found = [v for v in self.versions() if v.name == name and version in (None, v.version)]
        if not found:
            which = f" version {version}" if version else ""
            raise s.UnknownModel(f"There is no model {name!r}{which}.")
        return max(found, key=lambda v: (v.state is s.State.READY, v.version))

    async def infer(self, name, version, inputs, timeout=None, signature=s.DEFAULT_SIGNATURE):
        found = self.find(name, version)
        default = self.models[name, found.version]
        described, compute = default if signature == s.DEFAULT_SIGNATURE else self.others[name, signature]
        given = [spec for spec in described.inputs if spec.name in inputs]
        assert list(inputs) == [spec.name for spec in given]
        assert all(spec.optional for spec in described.inputs if spec not in given)
        for spec in given:
            array = inputs[spec.name]
            assert array.dtype == DTYPES[spec.datatype]
            assert len(array) >= 1
            assert array.ndim == len(spec.shape)
        self.timeouts.append(timeout)
        if self.gate is not None:
            self.waiting += 1
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return found, compute(inputs)

    async def load(self, name):
        added = {key: value for key, value in self.stored.items() if key[0] == name}
        if not added:
            raise s.UnknownModel(f"The repository has no model {name!r}.")
        self.models.update(added)

    async def unload(self, name, version=None):
        self.find(name, version)
        for key in list(self.models):
            if key[0] == name and version in (None, key[1]):
                del self.models[key]

    def repository(self):
        return sorted(self.stored)

    def status(self):
        rank = {"host": "here", "pid": 100, "state": "ready", "in_flight": 1, "batches": 7, "rows": 50}
        return {
            "mode": "replicas",
            "uptime": 12.5,
            "draining": not self.live,
            "ranks": [
                {"rank": 0, **rank, "busy": 1.5, "restarts": 0},
                {"rank": 1, **rank, "state": "lost", "busy": 0.5, "restarts": 2},
            ],
            "models": [
                {
                    "name": v.name,
                    "version": v.version,
                    "state": v.state.value,
                    "reason": v.reason,
                    "ranks": list(v.ranks),
                    "queue": 3,
                    "queued_rows": 9,
                    "in_flight": 2,
                    "batches": 7,
                    "rows": 50,
                    "padded_rows": 6,
                    "alone": "",
                    "batch_sizes": {"8": 6, "2": 1},
                }
                for v in self.versions()
            ],
            "queue": 3,
            "max_queue": 256,
        }
