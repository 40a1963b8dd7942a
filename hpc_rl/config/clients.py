"""How jobs ask services: time limits, repeats, and what a teacher's clients need besides (L11–L13, S2, S3).

The seeds' environment names set these fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from hpc_rl.config.base import (
    Fault,
    FilePath,
    FreeMapping,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class CallConfig(Section):
    """How jobs call a service. Internal calls ignore http_proxy."""

    url: str | None = None
    """Base URL of a server that already runs, `http://node-01:9000`. null = find it in the workspace. LISTENER_URL."""
    timeout_s: PositiveFloat = 60
    """Longest wait for one answer. Seconds. LISTENER_TIMEOUT."""
    max_retries: NonNegativeInt = 3
    """Repeats of a failed call before its samples are left out of their groups (L11). LISTENER_MAX_RETRIES."""
    backoff_factor: NonNegativeFloat = 1.0
    """The n-th repeat waits backoff_factor · 2^(n−1) seconds. LISTENER_BACKOFF_FACTOR."""
    parallel_calls: PositiveInt = 4
    """Calls of one client that are under way at once."""
    deadline_s: PositiveFloat = 900
    """Longest time for a call, with all that is waited for and repeated; then its job exits as blocked. Seconds."""

    @field_validator("url")
    @classmethod
    def _base_url(cls, value: str | None) -> str | None:
        """The base is what is kept, also where the URL names a route, as the seeds' do."""
        if value is None:
            return None
        base = value.rstrip("/")
        for route in ("/batch_score", "/score", "/chat/completions"):
            base = base.removesuffix(route).rstrip("/")
        if not base.startswith(("http://", "https://")) or len(base.split("://", 1)[1]) == 0:
            raise ValueError(f"{value!r} is no URL like http://gpu-node-01:9000")
        return base


class ClientConfig(CallConfig):
    """How jobs ask a service for scores."""

    chunk_size: PositiveInt = 32
    """Questions in one call. LISTENER_CHUNK_SIZE."""
    chunk_delay_s: NonNegativeFloat = 0
    """Pause between two calls of one client. Seconds. LISTENER_CHUNK_DELAY."""


class TeacherClientConfig(CallConfig):
    """How jobs ask a teacher (S2, S3): any OpenAI-compatible endpoint, or the teacher that the run serves itself."""

    url: str | None = None
    """Base URL of an endpoint, `https://api.example.com/v1`. null = the run's own teacher. TEACHER_BASE_URL."""
    model: str | None = None
    """The endpoint's name for the model. null = the only one that it has. TEACHER_MODEL."""
    api_key_env: str = "TEACHER_API_KEY"
    """Environment variable of the job that holds the endpoint's key; the key itself is never part of a config."""
    api_key_file: FilePath | None = None
    """File that holds the key instead: yours, mode 0600. It beats the variable."""
    proxy_from_env: bool = False
    """Go through the proxy that http_proxy and https_proxy name, where an outside endpoint is reached only by it."""
    timeout_s: PositiveFloat = 600
    """Longest wait for one answer. Seconds."""
    max_retries: NonNegativeInt = 6
    """Repeats of a call that was answered with a failure or not in time, before its question is left out."""
    backoff_factor: NonNegativeFloat = 1.0
    """The n-th repeat waits backoff_factor · 2^(n−1) seconds, at most 30."""
    parallel_calls: PositiveInt = 32
    """Calls of one client that are under way at once; fewer for a while after each 429."""
    deadline_s: PositiveFloat = 900
    """How long a job waits for an endpoint that answers nobody before it exits as blocked. Seconds."""
    requests_per_min: PositiveFloat | None = None
    """Most calls a minute of one client; n jobs that ask at once make n times as many. null = no limit."""
    tokens_per_min: PositiveFloat | None = None
    """Most tokens a minute of one client, prompts and longest possible answers together. null = no limit."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    """Temperature of questions that name none. null = none is sent at all: some models take no other than their own."""
    max_tokens: PositiveInt = 2048
    """Longest answer to questions that name no length, in tokens."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that; reasoning models of OpenAI want the longer name."""
    extra_body: FreeMapping = Field(default_factory=dict)
    """More fields of each call: `{top_p: 0.9, chat_template_kwargs: {enable_thinking: false}}`."""
    structured: Literal["json_schema", "json_object", "none"] = "json_schema"
    """What an endpoint is told (`response_format`) where an answer must follow a schema; answers are checked anyway."""
    bad_reply_retries: NonNegativeInt = 2
    """How often the teacher is asked again after an answer that does not follow its schema."""
    cache_dir: FilePath | None = None
    """Where answers are kept, so that nothing is paid twice; runs may share it. null = in the workspace."""

    def faults(self) -> Iterator[Fault]:
        """A key in the URL; fields that the client sets by itself."""
        for name in sorted({"model", "messages", "seed", "stream", "n", "response_format"} & set(self.extra_body)):
            yield Fault(("extra_body", name), "the client sets this by itself", way_out="remove it here")
        fields = {"temperature": "temperature", "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
        for name in sorted(fields.keys() & set(self.extra_body)):
            yield Fault(("extra_body", name), "there is a field for this", way_out=f"set {fields[name]} instead")
        if self.url and "@" in self.url.split("://", 1)[1].split("/", 1)[0]:
            what = "it has a user name or password in it, and configs are readable to others"
            yield Fault(("url",), what, "a URL without", f"put the key into {self.api_key_env}, or into api_key_file")


class EnhancerClientConfig(TeacherClientConfig):
    """How jobs ask the second teacher (S3). Its endpoint may be somebody else's, so the teacher's key is not sent."""

    api_key_env: str = "ENHANCER_API_KEY"
    """Environment variable of the job that holds the endpoint's key; the key itself is never part of a config."""
