"""What a server does, in numbers: what it is now for Prometheus (`/metrics`), and how it went for TensorBoard.

All names begin with `hpc_rl_service_`, units are seconds and items; `_total` only grows. Every server has a registry of
its own, so that several in one process do not add up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hpc_rl.services.frame import Service
from hpc_rl.services.guard import OWN_ROUTES
from hpc_rl.services.server import ServerThread

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

PREFIX = "hpc_rl_service_"
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
RECENT = 10_000
"""Answers of which the latency is kept until the next point."""
CLOSE_TIMEOUT_S = 10.0
HASH_CHARACTERS = 12


@dataclass(frozen=True)
class Totals:
    """What a server has done since it started.

    Attributes
    ----------
    items, batches
        Answered by the model, and in how many batches; failed ones too.
    model_seconds
        Added up over batches that ran at once.
    prompt_tokens, completion_tokens
        Read and written by the model.
    refusals
        Answers with 429 and 503: to be asked again.
    errors
        Answers with any other 5xx.
    """

    items: int
    batches: int
    model_seconds: float
    prompt_tokens: int
    completion_tokens: int
    refusals: int
    errors: int

    def since(self, before: Totals) -> dict[str, float]:
        """What was done since `before`, by attribute."""
        earlier = asdict(before)
        return {name: value - earlier[name] for name, value in asdict(self).items()}


class Metrics:
    """Counts what a service does; `on_batch` and `on_answer` are the hooks of its batcher and its guard."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = registry = CollectorRegistry()
        self._batch_items = Histogram(
            PREFIX + "batch_items", "Items of a batch", buckets=BATCH_ITEMS, registry=registry
        )
        self._model = Histogram(PREFIX + "model_seconds", "Time of a batch", buckets=SECONDS, registry=registry)
        self._requests = Histogram(
            PREFIX + "request_seconds",
            "From a request's head to its answer",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._answers = Counter(PREFIX + "answers", "By route and status", ["route", "status"], registry=registry)
        self._failed = Counter(PREFIX + "failed_batches", "Batches that the model failed at", registry=registry)
        about = {"service": service.name, "weights_hash": service.weights_hash[:HASH_CHARACTERS]}
        Info(PREFIX.rstrip("_"), "What is served", registry=registry).info(about)
        ProcessCollector(registry=registry)
        registry.register(_OfService(service))
        self._recent_s: deque[float] = deque(maxlen=RECENT)
        self._refusals = self._errors = 0

    def watch(self, server: ServerThread) -> None:
        """Show what the server has open, too."""
        self._registry.register(_OfServer(server))

    def on_batch(self, items: int, seconds: float, failed: bool) -> None:
        """After each batch, from any thread."""
        self._batch_items.observe(items)
        self._model.observe(seconds)
        if failed:
            self._failed.inc()

    def on_answer(self, route: str, status: int, seconds: float) -> None:
        """After each answer, in the server's thread."""
        self._requests.labels(route).observe(seconds)
        self._answers.labels(route, str(status)).inc()
        if route in OWN_ROUTES or route == "other":
            return
        if status < 400:
            self._recent_s.append(seconds)
        self._refusals += status in (429, 503)
        self._errors += status >= 500 and status != 503

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def totals(self) -> Totals:
        """What was done so far."""
        counters, tokens = self._service.batcher.counters, self._service.tokens
        return Totals(
            items=counters.items,
            batches=counters.batches,
            model_seconds=counters.seconds_in_model,
            prompt_tokens=tokens.prompt,
            completion_tokens=tokens.completion,
            refusals=self._refusals,
            errors=self._errors,
        )

    def scalars(self, before: Totals, now: Totals, seconds: float) -> dict[str, float]:
        """TensorBoard's points for the last `seconds`; what nothing was measured of has none."""
        done = now.since(before)
        batcher = self._service.batcher
        points: dict[str, float] = {"queue/items": batcher.waiting, "queue/clients": batcher.waiting_clients}
        points |= {f"per_second/{name}": value / seconds for name, value in done.items() if name != "model_seconds"}
        points["model/busy"] = done["model_seconds"] / seconds
        if done["batches"]:
            points["model/mean_batch_items"] = done["items"] / done["batches"]
        recent_s = [self._recent_s.popleft() for _ in range(len(self._recent_s))]
        if recent_s:
            points["latency/p50_seconds"], points["latency/p99_seconds"] = np.quantile(recent_s, (0.5, 0.99))
        return {name: float(value) for name, value in points.items()}


class _OfService(Collector):
    """What a service knows by itself, read when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        batcher, tokens = self._service.batcher, self._service.tokens
        yield GaugeMetricFamily(PREFIX + "queue_items", "Items that wait", value=batcher.waiting)
        yield GaugeMetricFamily(PREFIX + "queue_clients", "Clients that wait", value=batcher.waiting_clients)
        yield CounterMetricFamily(PREFIX + "items", "Items that the model was given", value=batcher.counters.items)
        yield CounterMetricFamily(
            PREFIX + "refused_requests", "No room, or no turn in time", value=batcher.counters.refused
        )
        yield CounterMetricFamily(
            PREFIX + "abandoned_requests", "The client hung up before its answer", value=batcher.counters.abandoned
        )
        counted = CounterMetricFamily(PREFIX + "tokens", "Read and written by the model", labels=["kind"])
        counted.add_metric(["prompt"], tokens.prompt)
        counted.add_metric(["completion"], tokens.completion)
        yield counted
        lookups = CounterMetricFamily(PREFIX + "cache_lookups", "By cache and outcome", labels=["cache", "outcome"])
        for cache, figures in self._service.details().items():
            if isinstance(figures, Mapping) and {"hits", "misses"} <= figures.keys():
                lookups.add_metric([cache, "hit"], figures["hits"])
                lookups.add_metric([cache, "miss"], figures["misses"])
        yield lookups


class _OfServer(Collector):
    """What a server has open, read when Prometheus asks."""

    def __init__(self, server: ServerThread) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        guard = self._server.guard
        yield GaugeMetricFamily(PREFIX + "connections", "Open connections", value=len(self._server.connections))
        yield GaugeMetricFamily(PREFIX + "requests_in_flight", "Not answered yet", value=guard.in_flight)
        yield GaugeMetricFamily(PREFIX + "draining", "1: it is leaving", value=guard.draining)


class Board:
    """Writes a server's figures to TensorBoard, in a thread of its own, until it is closed.

    A step is a second since the replica first wrote to the folder: one that is requeued goes on where it was. A folder
    that cannot be written costs the figures, with a line in the log, and nothing else.

    Parameters
    ----------
    metrics
        Whose figures.
    folder
        For this replica alone.
    every_s
        Seconds between two points, which show what was between them.
    """

    def __init__(self, metrics: Metrics, folder: Path, every_s: float) -> None:
        self._metrics, self._folder, self._every_s = metrics, folder, every_s
        self._step = -1
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last points, unless the file system hangs."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        before, looked = self._metrics.totals(), time.monotonic()
        try:
            began = _began(self._folder)
            with SummaryWriter(str(self._folder)) as writer:
                last = False
                while not last:
                    last = self._closing.wait(self._every_s)
                    now, at = self._metrics.totals(), time.monotonic()
                    self._write(writer, self._metrics.scalars(before, now, max(at - looked, 1e-3)), began)
                    before, looked = now, at
        except OSError as error:
            log.warning("no more figures for TensorBoard: %s cannot be written (%s)", self._folder, error)

    def _write(self, writer: SummaryWriter, points: Mapping[str, float], began: float) -> None:
        self._step = max(self._step + 1, round(time.time() - began))
        for name, value in points.items():
            writer.add_scalar(name, value, self._step)
        writer.flush()


def _began(folder: Path) -> float:
    """When the first event file in `folder` was begun: TensorBoard writes it into the name. Now, when there is none."""
    names = (path.name for path in folder.glob("events.out.tfevents.*"))
    return min((float(name.split(".")[3]) for name in names), default=time.time())
