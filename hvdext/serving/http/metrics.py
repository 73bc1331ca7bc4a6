"""Metrics for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from hvdext.serving.service import Service

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MODEL = ("model", "version")


class Metrics:
    """What is counted at the door, and what the service says at each scrape.

    Args:
        service: its `status` is asked for.
    """

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "hvdext_requests",
            "Requests that were answered.",
            (*_MODEL, "protocol", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "hvdext_request_seconds",
            "From a request's arrival to its answer.",
            (*_MODEL, "protocol"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_FromService(service))
        ProcessCollector(registry=self._registry)

    def observe(self, model: str, version: str, protocol: str, status: int, seconds: float) -> None:
        """Counts one answer.

        Args:
            model: a model that is known, or empty: names that clients make up must not become labels.
            version: that answered, or empty.
            protocol: "v2", "v2-binary", "tensorflow-serving" or empty.
            status: of HTTP.
            seconds: it took.
        """
        self._requests.labels(model, version, protocol, str(status)).inc()
        if model and status == 200:
            self._seconds.labels(model, version, protocol).observe(seconds)

    def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their media type, in the format that the scraper accepts."""
        encoder, media_type = choose_encoder(accept)
        return encoder(self._registry), media_type


class _FromService(Collector):
    def __init__(self, service: Service):
        self._service = service

    def describe(self) -> list[Metric]:
        return []  # the registry would scrape to find the names, before there is anything

    def collect(self) -> Iterator[Metric]:
        status = self._service.status()
        yield _gauge("hvdext_queue_requests", "Requests that wait.", [((), status["queue"])])
        yield _gauge("hvdext_queue_limit", "Requests that may wait.", [((), status["max_queue"])])
        yield _gauge("hvdext_draining", "1 while the server drains.", [((), int(status["draining"]))])
        states = [rank["state"] for rank in status["ranks"]]
        by_state = [((state,), states.count(state)) for state in ("ready", "starting", "lost")]
        yield _gauge("hvdext_ranks", "Ranks by state.", by_state, ("state",))
        yield from _of_ranks(status["ranks"])
        yield from _of_models(status["models"])


def _of_ranks(ranks: list[Mapping[str, Any]]) -> Iterator[Metric]:
    def samples(key: str) -> list:
        return [((str(rank["rank"]),), rank[key]) for rank in ranks]

    yield _gauge("hvdext_rank_in_flight_batches", "Batches a rank has.", samples("in_flight"), ("rank",))
    yield _counter("hvdext_rank_batches", "Batches a rank has computed.", samples("batches"), ("rank",))
    yield _counter("hvdext_rank_rows", "Rows a rank has computed.", samples("rows"), ("rank",))
    yield _counter("hvdext_rank_busy_seconds", "Time a rank has computed.", samples("busy"), ("rank",))
    yield _counter("hvdext_rank_restarts", "Times a rank was started again.", samples("restarts"), ("rank",))


def _of_models(models: list[Mapping[str, Any]]) -> Iterator[Metric]:
    def samples(key: str) -> list:
        return [((model["name"], str(model["version"])), model[key]) for model in models]

    ready = [((m["name"], str(m["version"])), int(m["state"] == "READY")) for m in models]
    ranks = [((m["name"], str(m["version"])), len(m["ranks"])) for m in models]
    yield _gauge("hvdext_model_ready", "1 if the version can answer.", ready, _MODEL)
    yield _gauge("hvdext_model_ranks", "Ranks that can answer for the version.", ranks, _MODEL)
    yield _gauge("hvdext_model_queue_requests", "Requests that wait.", samples("queue"), _MODEL)
    yield _gauge("hvdext_model_queue_rows", "Rows that wait.", samples("queued_rows"), _MODEL)
    yield _gauge("hvdext_model_in_flight_requests", "Requests being computed.", samples("in_flight"), _MODEL)
    yield _counter("hvdext_batches", "Batches computed.", samples("batches"), _MODEL)
    yield _counter("hvdext_rows", "Rows computed, without padding.", samples("rows"), _MODEL)
    yield _counter("hvdext_padded_rows", "Rows of padding computed.", samples("padded_rows"), _MODEL)
    sizes = HistogramMetricFamily("hvdext_batch_rows", "Rows per batch, without padding.", labels=_MODEL)
    for model in models:
        buckets, total = _buckets(model["batch_sizes"])
        sizes.add_metric((model["name"], str(model["version"])), buckets, total)
    yield sizes


def _buckets(batch_sizes: Mapping[str, int]) -> tuple[list[tuple[str, float]], float]:
    counts = {int(rows): batches for rows, batches in batch_sizes.items()}
    buckets: list[tuple[str, float]] = [
        (str(float(bound)), sum(n for rows, n in counts.items() if rows <= bound)) for bound in _BATCH_SIZES
    ]
    buckets.append(("+Inf", sum(counts.values())))
    return buckets, sum(rows * n for rows, n in counts.items())


def _gauge(name: str, help_: str, samples: list, labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, help_: str, samples: list, labels: tuple[str, ...] = ()) -> Metric:
    family = CounterMetricFamily(name, help_, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
