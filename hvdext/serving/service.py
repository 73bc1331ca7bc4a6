"""What the HTTP side of a server knows of the models behind it. Needs neither TensorFlow nor Horovod."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: unique among the model's inputs, and among its outputs.
        datatype: of the Open Inference Protocol: "BOOL", "UINT8" to "UINT64", "INT8" to "INT64", "FP16",
            "FP32", "FP64" or "BYTES" (text; NumPy arrays of `object` that hold `bytes`).
        shape: with the axis of the batch, which comes first; None where a length is open.
        optional: whether a request may leave it out; of an input.
    """

    name: str
    datatype: str
    shape: tuple[int | None, ...]
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, in the model's order.

    Attributes:
        inputs: what it takes.
        outputs: what it gives.
        alone: why a request's rows are never computed together with another's; empty: they may be.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    alone: str = ""

    @property
    def bare(self) -> TensorSpec | None:
        """The input that values without a name are for: the only one, or the only one that must be there."""
        required = [spec for spec in self.inputs if not spec.optional]
        found = self.inputs if len(self.inputs) == 1 else required
        return found[0] if len(found) == 1 else None


DEFAULT_SIGNATURE = "serving_default"


class State(enum.Enum):
    """Where a version is in its life."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model, as clients see it.

    Attributes:
        name: the model's.
        version: 1 or more; requests that name none go to the highest that is ready.
        state: READY as long as at least one rank (every stage of a pipeline) can answer.
        reason: why it is not ready; empty otherwise.
        signature: None before it has been loaded once.
        digest: SHA-256 of the model's files, in hexadecimal digits.
        platform: such as "keras" or "tensorflow_savedmodel".
        ranks: those that can answer now.
        others: what it takes and gives under the other names that requests may call it by.
    """

    name: str
    version: int
    state: State
    reason: str
    signature: Signature | None
    digest: str
    platform: str
    ranks: tuple[int, ...]
    others: Mapping[str, Signature] = field(default_factory=dict)

    @property
    def signatures(self) -> dict[str, Signature]:
        """All of them by name, the default first; empty before it has been loaded once."""
        if self.signature is None:
            return {}
        return {DEFAULT_SIGNATURE: self.signature, **self.others}


class ServiceError(Exception):
    """What a client is told; the message says what was expected.

    Attributes:
        status: of HTTP.
        retry_after: seconds, for the header of that name; None without.
    """

    status = 500
    retry_after: int | None = None


class InvalidRequest(ServiceError):
    """The request does not fit the model or the protocol."""

    status = 400


class UnknownModel(ServiceError):
    """No model, or no version, of that name."""

    status = 404


class NotReady(ServiceError):
    """The model is known but no rank can answer now; or the server drains."""

    status = 503
    retry_after = 1


class QueueFull(ServiceError):
    """More requests wait than the queue may hold."""

    status = 503
    retry_after = 1


class DeadlineExceeded(ServiceError):
    """The server's limit has passed before the answer was there."""

    status = 504


class OwnDeadlineExceeded(DeadlineExceeded):
    """The time that the request itself has set was too short: no fault of the server's."""

    status = 408


class ComputationFailed(ServiceError):
    """The model failed on this request, or the rank that had it was lost."""

    status = 500


class Service(Protocol):
    """Models that answer. All methods are called from the thread of the event loop."""

    def versions(self) -> list[ModelVersion]:
        """All versions of all models, by name and version."""

    def find(self, name: str, version: int | None = None) -> ModelVersion:
        """One version; without a number, the highest that is ready, or else the highest.

        Raises:
            UnknownModel: if there is none.
        """

    async def infer(
        self,
        name: str,
        version: int | None,
        inputs: Mapping[str, np.ndarray],
        timeout: float | None = None,
        signature: str = DEFAULT_SIGNATURE,
    ) -> tuple[ModelVersion, dict[str, np.ndarray]]:
        """The outputs of one request, and the version that gave them.

        Args:
            name: as in `find`.
            version: as in `find`.
            inputs: one array for each input of the signature, checked against it by the caller: names,
                dtypes, ranks and fixed lengths are right, and all have the same number of rows, 1 or more.
                Optional ones may be missing.
            timeout: seconds this request may take; None: the server's own limit.
            signature: one of the version's `signatures`.

        Returns:
            One array for each output of the signature, with as many rows.

        Raises:
            ServiceError: see its subclasses. Cancelling the task drops the request, in the queue or later.
        """

    async def load(self, name: str) -> None:
        """Loads what the repository holds of the model and is not loaded yet; returns once it is ready.

        Raises:
            UnknownModel: if the repository has no such model.
            InvalidRequest: if it cannot be loaded; what was there goes on answering.
        """

    async def unload(self, name: str, version: int | None = None) -> None:
        """Unloads a version, or all; requests that it has are answered first.

        Raises:
            UnknownModel: if there is none.
        """

    def repository(self) -> list[tuple[str, int]]:
        """Names and versions that the repository holds, loaded or not; empty without a repository."""

    @property
    def live(self) -> bool:
        """False once the server drains."""

    @property
    def ready(self) -> bool:
        """True if it does not drain and every model that is to answer has a version that is ready.

        A model whose loading has failed, or that is loaded beside those that answer, does not count.
        """

    def status(self) -> dict[str, Any]:
        """For the page and the metrics, as plain JSON.

        ```
        {"mode": "replicas" or "pipeline", "uptime": seconds, "draining": bool,
         "ranks": [{"rank": 0, "host": "...", "pid": 123, "state": "ready" | "starting" | "lost",
                    "in_flight": batches it has now, "batches": done so far, "rows": done so far,
                    "busy": seconds it has computed, "restarts": n}, ...],
         "models": [{"name", "version", "state", "reason", "ranks", "queue": requests waiting,
                     "queued_rows": rows waiting, "in_flight": requests being computed,
                     "batches": n, "rows": n, "padded_rows": n,
                     "alone": why requests are computed one by one, or "",
                     "batch_sizes": {"8": batches of 8 rows, without padding, ...}}, ...],
         "queue": requests waiting in all, "max_queue": its limit}
        ```
        """
