"""Servers that run elsewhere and that the config names: do they answer, and do they take the key?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from hpc_rl.config.clients import CallConfig, TeacherClientConfig
from hpc_rl.health.findings import Finding, Level, Subject
from hpc_rl.teachers.keys import BadKey, Key, read_key

AREA = "endpoints"
SAID_CHARACTERS = 300
TOKENS = 32
"""Longest answer to the question that is asked; whether it is taken is what matters."""


def endpoint(subject: Subject, name: str, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """The server of `services.NAME.client.url`: an OpenAI-compatible one by its models, one of ours by `/health`."""
    client = subject.config.services.of(name).client
    if isinstance(client, TeacherClientConfig):
        yield from _teacher(subject, name, client, environ)
    else:
        yield from _ours(subject, name, client)


def named(subject: Subject) -> tuple[str, ...]:
    """The services that have a `client.url`."""
    services = subject.config.services
    return tuple(name for name in type(services).model_fields if services.of(name).client.url)


def _teacher(subject: Subject, name: str, client: TeacherClientConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    field = f"services.{name}.client"
    try:
        key = read_key(client, environ, field)
    except BadKey as error:
        yield Finding(AREA, "problem", str(error), f"{client.api_key_env}, or a file of mode 0600 in api_key_file")
        return
    answer = _get(f"{client.url}/models", key, subject.patience_s, client.proxy_from_env)
    if isinstance(answer, str):
        yield _no_answer(subject, field, f"{client.url}/models", answer)
    elif answer.status_code in (401, 403):
        yield _refused(field, client, key)
    elif answer.status_code != 200:
        what = f"{field}: {client.url}/models answers {answer.status_code}"
        yield Finding(AREA, "warning", what, "see whether the URL is the one that ends in /v1, and whether it is up")
    else:
        found, model = _model(field, client, answer)
        yield found
        if model is not None and not subject.quick:
            yield _question(field, client, model, key, subject.patience_s)


def _refused(field: str, client: TeacherClientConfig, key: Key) -> Finding:
    what = f"{field}: {client.url} refuses {f'the key in {key.whose}' if key.text else 'to answer without a key'}"
    return Finding(AREA, "problem", what, f"export {client.api_key_env}=…, or name a file in {field}.api_key_file")


def _model(field: str, client: TeacherClientConfig, answer: Any) -> tuple[Finding, str | None]:
    """Whether the endpoint has the model that is asked for, and its name where it has."""
    try:
        has = [str(model["id"]) for model in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        remedy = "see whether it is an OpenAI-compatible endpoint"
        return Finding(AREA, "warning", f"{field}: {client.url}/models answers with no list of models", remedy), None
    listed = ", ".join(has[:5]) + (" …" if len(has) > 5 else "")
    if client.model is not None and client.model not in has:
        remedy = f"one of {listed}" if has else "start a model there"
        return Finding(AREA, "problem", f"{field}.model: {client.url} has no model {client.model!r}", remedy), None
    if client.model is None and len(has) != 1:
        what = f"{field}.model is null, and {client.url} has {len(has)} models"
        return Finding(AREA, "problem", what, f"one of {listed}" if has else "start a model there"), None
    model = client.model or has[0]
    return Finding(AREA, "ok", f"{field}: {client.url} answers, and has {model}"), model


def _question(field: str, client: TeacherClientConfig, model: str, key: Key, patience_s: float) -> Finding:
    """Whether it takes a question as jobs ask it, with a schema for the answer; the answer itself is of no interest."""
    url = f"{client.url}/chat/completions"
    asked = f"a question with structured: {client.structured}"
    answer = _get(url, key, patience_s, client.proxy_from_env, _body(client, model))
    if isinstance(answer, str):
        remedy = "see whether it is busy, or its model still being loaded; jobs wait longer"
        return Finding(AREA, "warning", f"{field}: no answer to {asked} from {url}: {answer}", remedy)
    if answer.status_code == 200:
        return Finding(AREA, "ok", f"{field}: it takes {asked}")
    if answer.status_code in (401, 403):
        return _refused(field, client, key)
    said = answer.text.replace(key.text, "***") if key.text else answer.text
    what = f"{field}: {client.url} answers {answer.status_code} to {asked}: {said[:SAID_CHARACTERS]}"
    if answer.status_code in (408, 409, 429) or answer.status_code >= 500:
        return Finding(AREA, "warning", what, "ask again later; jobs do so by themselves")
    remedy = f"set {field}.structured to json_object or none, or see to extra_body, temperature and max_tokens_field"
    return Finding(AREA, "problem", what, remedy)


def _body(client: TeacherClientConfig, model: str) -> dict[str, Any]:
    schema = {
        "type": "object", "properties": {"fine": {"type": "boolean"}}, "required": ["fine"],
        "additionalProperties": False,
    }  # fmt: skip
    formats = {
        "json_schema": {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}},
        "json_object": {"type": "json_object"},
    }
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": 'Answer with this JSON, and nothing else: {"fine": true}'}],
        client.max_tokens_field: TOKENS,
        **client.extra_body,
    }
    if client.temperature is not None:
        body["temperature"] = client.temperature
    if client.structured in formats:
        body["response_format"] = formats[client.structured]
    return body


def _ours(subject: Subject, name: str, client: CallConfig) -> Iterator[Finding]:
    field, url = f"services.{name}.client", f"{client.url}/health"
    answer = _get(url, None, subject.patience_s, proxies=False)
    if isinstance(answer, str):
        yield _no_answer(subject, field, url, answer)
    elif answer.status_code != 200:
        yield Finding(AREA, "problem", f"{field}: {url} answers {answer.status_code}", "see whether it is our service")
    else:
        yield Finding(AREA, "ok", f"{field}: {client.url} answers")


def _no_answer(subject: Subject, field: str, url: str, why: str) -> Finding:
    """Jobs on other nodes may well reach what a login node does not."""
    remedy = f"start it, or correct {field}.url; where only compute nodes reach it, ask from one of them"
    level: Level = "warning" if subject.executor == "slurm" else "problem"
    return Finding(AREA, level, f"{field}: no answer from {url}: {why}", remedy)


def _get(url: str, key: Key | None, patience_s: float, proxies: bool, body: Mapping[str, Any] | None = None) -> Any:
    """The answer, to a POST where there is a body; or why there is none."""
    import httpx  # here: most configs name no endpoint

    headers = {"authorization": f"Bearer {key.text}"} if key is not None and key.text else {}
    try:  # as the clients themselves: no proxy that nobody asked for, and no redirect, which would take the key along
        return httpx.request(
            "GET" if body is None else "POST", url, headers=headers, json=body, timeout=patience_s, trust_env=proxies,
            follow_redirects=False,
        )  # fmt: skip
    except httpx.LocalProtocolError as error:
        return type(error).__name__  # its text may be a header, and the key is in one
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return str(error) or type(error).__name__
