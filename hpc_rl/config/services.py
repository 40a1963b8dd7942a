"""Services and their clients: the frame that all of them share, and what each adds (L1–L5, L11–L13, V, A2, S2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import field_validator

from hpc_rl.config.base import (
    Fault,
    ModelPath,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    Section,
)

Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Engine = Literal["vllm", "transformers"]


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
    parallel_calls: PositiveInt = 4
    """Calls of one client that are under way at once."""
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


class ServiceConfig(Section):
    """The frame of a service: where it listens, how it batches, what it refuses, when it leaves."""

    placement: Literal["job", "hetjob"] = "job"
    """job: a Slurm job of its own, which starts when its consumer may. hetjob: one heterogeneous job with its
    consumer, so that neither waits for the other."""
    host: str | None = None
    """Address to bind and publish. null = bind all, publish the host's name or `cluster.network_interface`."""
    port: Port = 0
    """Port to bind; 0 = any free one. It is bound first and published afterwards."""
    port_range: tuple[Port, Port] | None = None
    """First and last port that a firewall lets through; the first free one is taken."""
    allowed_hosts: tuple[str, ...] = ()
    """More names that requests may use for this server (`Host:`), besides its own names and addresses."""
    inference_concurrency: PositiveInt = 1
    """Model batches that run at once. INFERENCE_CONCURRENCY sets the listener's."""
    acquire_timeout_s: PositiveFloat = 300
    """Longest wait of a request for its turn, then 503. Seconds. INFERENCE_ACQUIRE_TIMEOUT sets the listener's."""
    batch_size: PositiveInt = 64
    """Items in one model batch, merged over all clients (L4). LISTENER_BATCH_SIZE sets the listener's."""
    batch_wait_ms: NonNegativeFloat = 5
    """How long a batch waits for more requests. Milliseconds."""
    max_queue_items: PositiveInt = 4096
    """Items that may wait, of all clients; beyond that requests get 503 and Retry-After."""
    max_client_items: PositiveInt | None = None
    """Items of one client that may wait; beyond that its requests get 429 and Retry-After. null = half of the queue."""
    max_request_items: PositiveInt | None = None
    """Items in one request; beyond that it gets 413. null = as many as one client may have waiting."""
    max_body_bytes: PositiveInt = 16_777_216
    """Largest request body; beyond that 413."""
    body_timeout_s: PositiveFloat = 30
    """Longest time that a request's head, and its body, may take to arrive; then the client is cut off. Seconds."""
    max_connections: PositiveInt = 1024
    """Connections that are open at once; more are closed at once."""
    idle_timeout_s: PositiveFloat = 1800
    """The server leaves after this long without a request. Seconds."""
    drain_s: NonNegativeFloat = 60
    """Before its time limit the server finishes what it has and sends new requests elsewhere for this long. Seconds."""
    heartbeat_s: PositiveFloat = 10
    """How often the handoff file is renewed. Seconds."""
    metrics_s: PositiveFloat = 15
    """How often the figures of `/metrics` go to TensorBoard. Seconds."""
    client: ClientConfig = ClientConfig.model_construct()
    """Its clients."""

    @property
    def client_items(self) -> int:
        """`max_client_items` with its default resolved."""
        return self.max_client_items or max(1, self.max_queue_items // 2)

    @property
    def request_items(self) -> int:
        """`max_request_items` with its default resolved."""
        return self.max_request_items or self.client_items

    def faults(self) -> Iterator[Fault]:
        """Two ways to choose a port; an empty range; a request that is allowed but would never have room."""
        for name, value, above, limit in (
            ("max_client_items", self.client_items, "max_queue_items", self.max_queue_items),
            ("max_request_items", self.request_items, "max_client_items", self.client_items),
        ):
            if value > limit:
                yield Fault((name,), f"{value} is above {above}, so it would never have room", f"at most {limit}")
        if self.port_range is None:
            return
        if self.port:
            yield Fault(("port",), f"{self.port}, and port_range is given too", "0 to take a port of the range")
        if not 0 < self.port_range[0] <= self.port_range[1]:
            yield Fault(("port_range",), f"{list(self.port_range)} has no port", "[first, last], both above 0")


class ImageServiceConfig(ServiceConfig):
    """A service that opens images for its clients."""

    max_image_bytes: PositiveInt = 67_108_864
    """Largest image file."""
    max_image_pixels: PositiveInt = 50_000_000
    """Most pixels of an image before it is scaled; looked at before it is decoded."""


class ListenerServiceConfig(ImageServiceConfig):
    """The listener's server (L1–L4); its model is `listener`."""

    engine: Engine = "transformers"
    """What runs the model. transformers keeps image features, vllm its prefix cache; neither replaces the other."""


class SpeakerServiceConfig(ImageServiceConfig):
    """The speaker's server (L5); its model is the run's speaker, its engine `sample.engine`."""


class RewardModelServiceConfig(ServiceConfig):
    """A server that scores solutions: a reward model (A2), or the verifier of a prover (V)."""

    model: ModelPath | None = None
    """Folder of a sequence-classification model with one output. null = none is served."""
    engine: Engine = "transformers"
    """What runs the model."""
    dtype: Dtype = "bfloat16"
    """Number type of weights and activations."""
    attn_implementation: Attention = "auto"
    """Attention code, with engine transformers."""


class TeacherServiceConfig(ServiceConfig):
    """A local teacher (S2): an OpenAI-compatible chat endpoint."""

    model: ModelPath | None = None
    """Folder of a chat model. null = none is served."""
    engine: Engine = "vllm"
    """What runs the model."""
    dtype: Dtype = "bfloat16"
    """Number type of weights and activations."""


class ServicesConfig(Section):
    """The services of a run."""

    listener: ListenerServiceConfig = ListenerServiceConfig.model_construct()
    """The listener."""
    speaker: SpeakerServiceConfig = SpeakerServiceConfig.model_construct()
    """The speaker."""
    verifier: RewardModelServiceConfig = RewardModelServiceConfig.model_construct()
    """The verifier."""
    reward_model: RewardModelServiceConfig = RewardModelServiceConfig.model_construct()
    """The reward model."""
    teacher: TeacherServiceConfig = TeacherServiceConfig.model_construct()
    """A teacher of our own."""

    def of(self, name: str) -> ServiceConfig:
        """The settings of the service `name`."""
        options = getattr(self, name)
        assert isinstance(options, ServiceConfig), name
        return options
