"""Services: the frame that all of them share, and what each adds (L1–L5, V, A2, S2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hpc_rl.config.base import (
    Fault,
    Fraction,
    ModelPath,
    NonNegativeFloat,
    Port,
    PositiveFloat,
    PositiveInt,
    Section,
)
from hpc_rl.config.clients import CallConfig, ClientConfig, EnhancerClientConfig, TeacherClientConfig

if TYPE_CHECKING:
    from hpc_rl.config.schema import StageConfig

Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Engine = Literal["vllm", "transformers"]
RULES_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
MOST_REQUEST_ITEMS = 16_384
"""No list in a request is read further than that."""


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
    """Longest wait of a request for its turn, then 503; half of its client's time limit where that is less. Seconds.
    INFERENCE_ACQUIRE_TIMEOUT sets the listener's."""
    batch_size: PositiveInt = 64
    """Items in one model batch, merged over all clients (L4). LISTENER_BATCH_SIZE sets the listener's."""
    batch_wait_ms: NonNegativeFloat = 5
    """How long a batch waits for more requests. Milliseconds."""
    max_queue_items: PositiveInt = 4096
    """Items that may wait, of all clients; beyond that requests get 503 and Retry-After."""
    max_client_items: PositiveInt | None = None
    """Items of one client that may wait; beyond that its requests get 429 and Retry-After. null = half of the queue."""
    max_request_items: Annotated[int, Field(ge=1, le=MOST_REQUEST_ITEMS)] | None = None
    """Items in one request, at most 16384; beyond that it gets 413. null = as many as one client may have waiting."""
    max_body_bytes: PositiveInt = 16_777_216
    """Largest request body; beyond that 413."""
    max_requests_bytes: PositiveInt = 1_073_741_824
    """Bodies of all requests that are under way together; beyond that requests get 503 and Retry-After."""
    body_timeout_s: PositiveFloat = 30
    """Longest time that a request's head, and its body, may take to arrive; then the client is cut off. Seconds."""
    max_connections: PositiveInt = 1024
    """Connections that are open at once; for one more, the oldest that never showed the token is closed."""
    idle_timeout_s: PositiveFloat = 1800
    """The server leaves after this long without a request, while no consumer is at work; never in one job with its
    consumer. Seconds."""
    drain_s: NonNegativeFloat = 60
    """Before its time limit the server finishes what it has and sends new requests elsewhere for this long. Seconds."""
    heartbeat_s: PositiveFloat = 10
    """How often the handoff file is renewed. Seconds."""
    metrics_s: PositiveFloat = 15
    """How often the figures of `/metrics` go to TensorBoard. Seconds."""
    client: CallConfig = CallConfig.model_construct()
    """Its clients."""

    @property
    def client_items(self) -> int:
        """`max_client_items` with its default resolved."""
        return self.max_client_items or max(1, self.max_queue_items // 2)

    @property
    def request_items(self) -> int:
        """`max_request_items` with its default resolved."""
        return self.max_request_items or min(self.client_items, MOST_REQUEST_ITEMS)

    def faults(self) -> Iterator[Fault]:
        """Two ways to choose a port; an empty range; a request that is allowed but would never have room."""
        for name, value, above, limit in (
            ("max_client_items", self.client_items, "max_queue_items", self.max_queue_items),
            ("max_request_items", self.request_items, "max_client_items", self.client_items),
            ("max_body_bytes", self.max_body_bytes, "max_requests_bytes", self.max_requests_bytes),
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
    max_image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 50_000_000
    """Most pixels of an image before it is scaled; looked at before it is decoded. Decoding takes up to 20 bytes of
    memory a pixel. Pillow decodes nothing above 178956970."""
    image_timeout_s: PositiveFloat = 10
    """Most time that a processor may decode an image for. Seconds."""


class ListenerServiceConfig(ImageServiceConfig):
    """The listener's server (L1–L4); its model is `listener`."""

    engine: Engine = "transformers"
    """What runs the model: transformers, which keeps image features, or vllm, which keeps what it has read of a prompt.
    There is no silent change from one to the other."""
    max_model_len: PositiveInt | None = None
    """Longest question with its image, in tokens; longer ones get no answer. null = the model's own limit."""
    max_pass_tokens: PositiveInt = 65_536
    """Tokens in one forward pass, padding included, with engine transformers: a larger batch takes several passes."""
    gpu_memory_utilization: Fraction = 0.8
    """Share of a GPU's memory to take, with engine vllm."""
    image_cache_mb: PositiveInt = 1024
    """Memory for images that are ready for the next question. MiB."""
    client: ClientConfig = ClientConfig.model_construct()
    """Its clients."""

    def faults(self) -> Iterator[Fault]:
        """Batches at once in an engine that runs one."""
        yield from super().faults()
        if self.engine == "vllm" and self.inference_concurrency > 1:
            what = f"{self.inference_concurrency}, but engine vllm runs one batch at a time"
            yield Fault(("inference_concurrency",), what, "1", "batch_size makes its batches larger")


class SpeakerServiceConfig(ImageServiceConfig):
    """The speaker's server (L5); its model is the run's speaker, its engine `sample.engine`."""


class RewardModelServiceConfig(ServiceConfig):
    """A server that scores solutions: a reward model (A2), or the verifier of a prover (V)."""

    model: ModelPath | None = None
    """Folder of a sequence-classification model with one output. null = none is served."""
    engine: Engine = "transformers"
    """What runs the model."""
    dtype: Dtype = "bfloat16"
    """Number type of weights and activations; the head computes in float32."""
    attn_implementation: Attention = "auto"
    """Attention code, with engine transformers."""
    system_prompt: str | None = r"Please reason step by step, and check your final answer within \boxed{}."
    """System message before question and solution (A2). null = none of ours; chat templates may have their own."""
    max_model_len: PositiveInt | None = None
    """Longest question and solution together, in tokens; longer ones get no score. null = the model's own limit."""
    max_pass_tokens: PositiveInt = 32_768
    """Tokens in one forward pass, padding included, with engine transformers: a larger batch takes several passes."""
    gpu_memory_utilization: Fraction = 0.8
    """Share of a GPU's memory to take, with engine vllm."""
    client: ClientConfig = ClientConfig.model_construct()
    """Its clients."""


class TeacherServiceConfig(ServiceConfig):
    """A local teacher (S2): an OpenAI-compatible chat endpoint."""

    model: ModelPath | None = None
    """Folder of a chat model. null = none is served. Clients call it by the folder's name."""
    engine: Engine | Literal["rules"] = "vllm"
    """What answers: vllm or transformers run the model; transformers knows no `response_format` other than text.
    rules: no model, but the function that `rules` names."""
    rules: Annotated[str, Field(pattern=RULES_PATTERN)] | None = None
    """With engine rules, the function: `package.module:function`, as the service's Python imports it. It gets the
    messages of a chat and its seed, and returns the text of the answer; equal ones must get equal answers."""
    dtype: Dtype = "bfloat16"
    """Number type of weights and activations."""
    attn_implementation: Attention = "auto"
    """Attention code, with engine transformers."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and answer together, in tokens. null = the model's own limit."""
    max_tokens: PositiveInt = 1024
    """Longest answer to a request that names no length, in tokens."""
    gpu_memory_utilization: Fraction = 0.8
    """Share of a GPU's memory to take, with engine vllm."""
    client: TeacherClientConfig = TeacherClientConfig.model_construct()
    """Its clients, and those of the endpoint that stands in its place."""

    @property
    def served_model(self) -> str | None:
        """What clients call its model: the folder's name, or the rules' own; None where nothing is served."""
        if self.engine == "rules":
            return self.rules
        return Path(self.model).name if self.model is not None else None

    def faults(self) -> Iterator[Fault]:
        """Rules without a function, a function that nobody calls, rules and a model."""
        yield from super().faults()
        if self.engine == "rules" and self.rules is None:
            yield Fault(("rules",), "null, but engine is rules", "package.module:function")
        if self.engine != "rules" and self.rules is not None:
            way_out = "set engine: rules, or remove it"
            yield Fault(("rules",), f"{self.rules}, but engine is {self.engine}", "null", way_out)
        if self.engine == "rules" and self.model is not None:
            yield Fault(("model",), f"{self.model}, but engine rules has no model", "null", "remove one of the two")


class EnhancerServiceConfig(TeacherServiceConfig):
    """A second local teacher, or the endpoint that stands in its place, with a key of its own."""

    client: EnhancerClientConfig = EnhancerClientConfig.model_construct()
    """Its clients, and those of the endpoint that stands in its place."""


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
    enhancer: EnhancerServiceConfig = EnhancerServiceConfig.model_construct()
    """A second teacher of our own, where one grades and another writes questions (S3)."""

    def of(self, name: str) -> ServiceConfig:
        """The settings of the service `name`."""
        options = getattr(self, name)
        assert isinstance(options, ServiceConfig), name
        return options

    def placement_faults(self, stages: Mapping[str, StageConfig], serving: Collection[str]) -> Iterator[Fault]:
        """What a heterogeneous job of a consumer and its service cannot have; `grade.listener` serves `grade`.

        Only the stages that are `serving` are looked at: the others are no part of the run.
        """
        for stage, own in stages.items():
            consumer, _, name = stage.rpartition(".") if stage in serving else ("", "", "")
            options = getattr(self, name, None) if consumer in stages else None
            if not isinstance(options, ServiceConfig) or options.placement == "job" or options.client.url:
                continue
            together = f"with services.{name}.placement: hetjob {consumer} and {stage} are one job"
            for part in (consumer, stage):
                if stages[part].tasks > 1:
                    what = f"{stages[part].tasks}, but {together}, and Slurm has no arrays of such"
                    yield Fault(("stages", part, "tasks"), what, "1", f"one task, or services.{name}.placement: job")
            if own.mem_gb is None and stages[consumer].mem_gb is not None:
                what = (
                    f"null, but {together}, and sbatch would give it the {stages[consumer].mem_gb:g} GiB of {consumer}"
                )
                yield Fault(("stages", stage, "mem_gb"), what, "a number")
            longest_min = stages[consumer].time_min
            if own.time_min < longest_min:
                what = f"{own.time_min}, but {together}, and {consumer} would be left without it after that"
                yield Fault(("stages", stage, "time_min"), what, f"at least {longest_min}, as long as {consumer}")
