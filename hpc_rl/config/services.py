"""The listener service and its clients (L1–L5, L11–L13). The seed's environment names set these fields."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import field_validator

from hpc_rl.config.base import Fault, NonNegativeFloat, NonNegativeInt, Port, PositiveFloat, PositiveInt, Section


class ClientConfig(Section):
    """How jobs call a service. Internal calls ignore http_proxy."""

    url: str | None = None
    """Base URL of a server that already runs, `http://node-01:9000`. null = find it in the workspace. LISTENER_URL."""
    timeout_s: PositiveFloat = 60
    """Longest wait for one answer. Seconds. LISTENER_TIMEOUT."""
    chunk_size: PositiveInt = 32
    """Questions in one call. LISTENER_CHUNK_SIZE."""
    chunk_delay_s: NonNegativeFloat = 0
    """Pause between two calls of one client. Seconds. LISTENER_CHUNK_DELAY."""
    max_retries: NonNegativeInt = 3
    """Repeats of a failed call before its samples are left out of their groups (L11). LISTENER_MAX_RETRIES."""
    backoff_factor: NonNegativeFloat = 1.0
    """The n-th repeat waits backoff_factor · 2^(n−1) seconds. LISTENER_BACKOFF_FACTOR."""
    deadline_s: PositiveFloat = 900
    """How long a job waits for a server that is not there at all before it exits as blocked. Seconds."""

    @field_validator("url")
    @classmethod
    def _base_url(cls, value: str | None) -> str | None:
        """The seed's LISTENER_URL names the route; the base is what is kept."""
        if value is None:
            return None
        base = value.rstrip("/").removesuffix("/batch_score").removesuffix("/score").rstrip("/")
        if not base.startswith(("http://", "https://")) or len(base.split("://", 1)[1]) == 0:
            raise ValueError(f"{value!r} is no URL like http://gpu-node-01:9000")
        return base


class ListenerServiceConfig(Section):
    """The listener's HTTP server."""

    host: str | None = None
    """Address to bind and publish. null = bind all, publish the host's name or `cluster.network_interface`."""
    port: Port = 0
    """Port to bind; 0 = any free one. It is bound first and published afterwards."""
    port_range: tuple[Port, Port] | None = None
    """First and last port that a firewall lets through; the first free one is taken."""
    inference_concurrency: PositiveInt = 1
    """Model batches that run at once. INFERENCE_CONCURRENCY."""
    acquire_timeout_s: PositiveFloat = 300
    """Longest wait of a request for its turn, then 503. Seconds. INFERENCE_ACQUIRE_TIMEOUT."""
    batch_size: PositiveInt = 64
    """Image–question pairs in one forward pass, merged over all clients (L4). LISTENER_BATCH_SIZE."""
    batch_wait_ms: NonNegativeFloat = 5
    """How long a batch waits for more requests. Milliseconds."""
    max_queue_pairs: PositiveInt = 4096
    """Pairs that may wait; beyond that requests get 503 and Retry-After."""
    max_body_bytes: PositiveInt = 16_777_216
    """Largest request body."""
    idle_timeout_s: PositiveFloat = 1800
    """The server leaves after this long without a request. Seconds."""
    drain_s: NonNegativeFloat = 60
    """Before its time limit the server finishes what it has and sends new requests elsewhere for this long. Seconds."""
    heartbeat_s: PositiveFloat = 10
    """How often the handoff file is renewed. Seconds."""
    client: ClientConfig = ClientConfig.model_construct()
    """Its clients."""

    def faults(self) -> Iterator[Fault]:
        """Two ways to choose a port; an empty range."""
        if self.port_range is None:
            return
        if self.port:
            yield Fault(("port",), f"{self.port}, and port_range is given too", "0 to take a port of the range")
        if not 0 < self.port_range[0] <= self.port_range[1]:
            yield Fault(("port_range",), f"{list(self.port_range)} has no port", "[first, last], both above 0")


class ServicesConfig(Section):
    """The services of a run."""

    listener: ListenerServiceConfig = ListenerServiceConfig.model_construct()
    """The listener."""
