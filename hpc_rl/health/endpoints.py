"""Servers that run elsewhere and that the config names: do they answer, and do they take the key?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from hpc_rl.config.clients import CallConfig, TeacherClientConfig
from hpc_rl.health.findings import Finding, Subject
from hpc_rl.services.trust import Untrusted, read_own

AREA = "endpoints"


def endpoint(subject: Subject, name: str, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """The server of `services.NAME.client.url`: an OpenAI-compatible one by its models, one of ours by `/health`."""
    client = subject.config.services.of(name).client
    if isinstance(client, TeacherClientConfig):
        yield from _teacher(name, client, subject.patience_s, environ)
    else:
        yield from _ours(name, client, subject.patience_s)


def named(subject: Subject) -> tuple[str, ...]:
    """The services that have a `client.url`."""
    services = subject.config.services
    return tuple(name for name in type(services).model_fields if services.of(name).client.url)


def _teacher(
    name: str, client: TeacherClientConfig, patience_s: float, environ: Mapping[str, str]
) -> Iterator[Finding]:
    field = f"services.{name}.client"
    try:
        key, whose = _key(client, environ)
    except (OSError, Untrusted) as error:
        remedy = "write the key into the file and chmod 600 it, or use api_key_env"
        yield Finding(AREA, "problem", f"{field}.api_key_file: {error}", remedy)
        return
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = _get(f"{client.url}/models", headers, patience_s, client.proxy_from_env)
    if isinstance(answer, str):
        yield _no_answer(field, f"{client.url}/models", answer)
    elif answer.status_code in (401, 403):
        what = f"{field}: {client.url} refuses {f'the key in {whose}' if key else 'to answer without a key'}"
        yield Finding(AREA, "problem", what, f"export {client.api_key_env}=…, or name a file in {field}.api_key_file")
    elif answer.status_code != 200:
        what = f"{field}: {client.url}/models answers {answer.status_code}"
        yield Finding(AREA, "warning", what, "see whether the URL is the one that ends in /v1, and whether it is up")
    else:
        yield _model(field, client, answer)


def _model(field: str, client: TeacherClientConfig, answer: Any) -> Finding:
    """Whether the endpoint has the model that is asked for."""
    try:
        has = [str(model["id"]) for model in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        remedy = "see whether it is an OpenAI-compatible endpoint"
        return Finding(AREA, "warning", f"{field}: {client.url}/models answers with no list of models", remedy)
    listed = ", ".join(has[:5]) + (" …" if len(has) > 5 else "")
    if client.model is not None and client.model not in has:
        remedy = f"one of {listed}" if has else "start a model there"
        return Finding(AREA, "problem", f"{field}.model: {client.url} has no model {client.model!r}", remedy)
    if client.model is None and len(has) != 1:
        what = f"{field}.model is null, and {client.url} has {len(has)} models"
        return Finding(AREA, "problem", what, f"one of {listed}" if has else "start a model there")
    return Finding(AREA, "ok", f"{field}: {client.url} answers, and has {client.model or has[0]}")


def _ours(name: str, client: CallConfig, patience_s: float) -> Iterator[Finding]:
    field, url = f"services.{name}.client", f"{client.url}/health"
    answer = _get(url, {}, patience_s, proxies=False)
    if isinstance(answer, str):
        yield _no_answer(field, url, answer)
    elif answer.status_code != 200:
        yield Finding(AREA, "problem", f"{field}: {url} answers {answer.status_code}", "see whether it is our service")
    else:
        yield Finding(AREA, "ok", f"{field}: {client.url} answers")


def _no_answer(field: str, url: str, why: str) -> Finding:
    remedy = f"start it, or correct {field}.url; where only compute nodes reach it, ask from one of them"
    return Finding(AREA, "problem", f"{field}: no answer from {url}: {why}", remedy)


def _key(client: TeacherClientConfig, environ: Mapping[str, str]) -> tuple[str, str]:
    """The key, and where it is from. It is shown nowhere."""
    if client.api_key_file is None:
        return environ.get(client.api_key_env, "").strip(), client.api_key_env
    return read_own(client.api_key_file, private=True).decode(errors="replace").strip(), str(client.api_key_file)


def _get(url: str, headers: Mapping[str, str], patience_s: float, proxies: bool) -> Any:
    """The answer, or why there is none."""
    import httpx  # here: most configs name no endpoint

    try:  # as the clients themselves: no proxy that nobody asked for, and no redirect, which would take the key along
        return httpx.get(url, headers=headers, timeout=patience_s, trust_env=proxies, follow_redirects=False)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return str(error) or type(error).__name__
