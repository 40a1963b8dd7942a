"""Asking a teacher many questions: each is answered once and in order, or left out with a reason.

    ask_all → cache → pace (calls at once, rates) → endpoint → answer → cache → checked against its schema

What cannot be answered is a `TeacherError` in its place, to be left out and counted; an answer is never invented. When
the endpoint answers nobody until the deadline, that is `ServiceUnavailable`: what was answered before is in the cache.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.config.schema import Config
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.calling import ServiceRefused
from hpc_rl.services.loop_thread import LoopThread, each
from hpc_rl.teachers import replies
from hpc_rl.teachers.cache import Answer, Cache, key_of
from hpc_rl.teachers.calls import Problem
from hpc_rl.teachers.endpoints import Endpoint, Named, OfTheRun
from hpc_rl.teachers.pace import Pace
from hpc_rl.teachers.patience import Patience
from hpc_rl.teachers.questions import Question, Reply, TeacherError, Totals
from hpc_rl.teachers.refusals import Refusals

Progress = Callable[[int, int], None]
CHARACTERS_PER_TOKEN = 3
"""A low guess, so that prompts are rather thought too long: what was not used is given back."""
SEED_STEP, SEEDS = 1_000_003, 2**31
SHOWN_CHARACTERS = 2000


class TeacherClient:
    """Asks a teacher. Any number of threads may ask at once; limits and cache are the client's.

    Parameters
    ----------
    options
        `services.teacher.client`.
    endpoint
        Whom to call.
    model
        The endpoint's name for the model; None = the only one that it has.
    cache
        Folder of the answers.
    section
        Where the options are in the config, for messages.
    """

    def __init__(
        self,
        options: TeacherClientConfig,
        endpoint: Endpoint,
        model: str | None,
        cache: Path,
        section: str = "services.teacher.client",
    ) -> None:
        for name in ("openai", "httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # else every call is a line in the job's log
        self._options, self._endpoint, self._model, self._totals = options, endpoint, model, Totals()
        self._section = section
        self._weights: str | None = None
        self._cache = Cache(cache)
        self._pace = Pace(options.parallel_calls, options.requests_per_min, options.tokens_per_min)
        self._patience = Patience(options, self._pace, random.Random())
        self._refusals = Refusals(section, options.structured)
        self._under_way: dict[str, asyncio.Task[Answer | Problem]] = {}
        self._loop = LoopThread("teacher-client")

    @classmethod
    def of_run(
        cls,
        ws: Workspace,
        config: Config,
        environ: Mapping[str, str] = os.environ,
        service: Literal["teacher", "enhancer"] = "teacher",
    ) -> TeacherClient:
        """A teacher of a run: the endpoint that `services.SERVICE.client` names, else the one that the run serves.

        Raises
        ------
        ServiceRefused
            When there is neither, or the endpoint's key cannot be read.
        """
        settings = config.services.teacher if service == "teacher" else config.services.enhancer
        options, section = settings.client, f"services.{service}.client"
        cache = options.cache_dir or ws.teacher_cache
        if options.url is not None:
            return cls(options, Named(options, environ, section), options.model, cache, section)
        if settings.served_model is not None:
            return cls(options, OfTheRun(ws.service_dir(service), options), settings.served_model, cache, section)
        variable = " (TEACHER_BASE_URL)" if service == "teacher" else ""
        raise ServiceRefused(
            f"there is no {service}: name an endpoint in {section}.url{variable}, or in services.{service}.model the "
            "folder of a model to serve"
        )

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is under way, close connections and cache."""
        self._loop.close(self._endpoint.close)
        self._cache.close()

    @property
    def totals(self) -> Totals:
        """What it has done so far."""
        return replace(self._totals, calls=self._patience.calls, repeats=self._patience.repeats)

    def ask_all(self, questions: Sequence[Question], progress: Progress | None = None) -> list[Reply | TeacherError]:
        """Answers in the order of the questions; what was asked before, or twice here, is paid once.

        Parameters
        ----------
        questions
            Any number; `parallel_calls` are under way at once. For none nobody is asked anything.
        progress
            Told after each how many of how many are done, in the client's own thread.

        Raises
        ------
        ServiceUnavailable
            When the endpoint answered nobody for `deadline_s`; what it answered before is kept.
        ServiceRefused
            When no call can succeed, or all of the first were refused; the message says what to change.
        ValueError
            For a schema that is none.
        """
        for schema in {id(question.schema): question.schema for question in questions}.values():
            if schema is not None:
                replies.check_schema(schema)
        return self._loop.run(self._ask_all(questions, progress)) if questions else []

    async def _ask_all(self, questions: Sequence[Question], progress: Progress | None) -> list[Reply | TeacherError]:
        self._cache.refresh()
        self._model = self._model or await self._only_model()
        if self._weights is None:
            self._weights = await self._endpoint.weights()
        done = 0

        async def ask(question: Question) -> Reply | TeacherError:
            nonlocal done
            reply = await self._ask(question)
            done += 1
            if progress is not None:
                progress(done, len(questions))
            return reply

        return await each(questions, ask, self._options.parallel_calls)

    async def _ask(self, question: Question) -> Reply | TeacherError:
        """One answer that can be used, asked for again with a note of what was wrong with the last."""
        self._totals.questions += 1
        note: list[Mapping[str, str]] = []
        tries = 1 + self._options.bad_reply_retries
        for number in range(tries):
            found = await self._answer(self._body(question, note, number))
            if isinstance(found, Problem):
                self._totals.errors += 1
                return TeacherError(found.text)
            answer, cached = found
            value = None
            try:
                value = replies.read(answer, question.schema)
                replies.check(value, question.check)
            except replies.BadReply as error:
                self._totals.bad_replies += 1
                problem = str(error)
                only = ", with nothing but the JSON" if question.schema is not None else ""
                wish = f"This cannot be used: {error}. Answer again{only} (try {number + 2} of {tries})."
                said = answer.text[:SHOWN_CHARACTERS] or "(nothing)"
                note = [{"role": "assistant", "content": said}, {"role": "user", "content": wish}]
                continue
            return Reply(
                answer.text, value, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens, cached
            )
        self._totals.errors += 1
        return TeacherError(f"no answer of use in {tries} tries: {problem}", bad_reply=True, value=value)

    def _body(self, question: Question, note: Sequence[Mapping[str, str]], number: int) -> dict[str, Any]:
        """What is sent; the cache goes by it."""
        options = self._options
        temperature = options.temperature
        if temperature is not None and question.temperature is not None:
            temperature = question.temperature
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [*question.messages, *note],
            options.max_tokens_field: question.max_tokens or options.max_tokens,
            **options.extra_body,
        }
        if temperature is not None:
            body["temperature"] = temperature
        if question.seed is not None:
            body["seed"] = (question.seed + number * SEED_STEP) % SEEDS
        if question.schema is not None and options.structured == "json_schema":
            schema = {"name": "reply", "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif question.schema is not None and options.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    async def _answer(self, body: dict[str, Any]) -> tuple[Answer, bool] | Problem:
        """The answer to `body`, and whether it was known."""
        key = key_of(body, self._weights or "")
        if (known := self._cache.get(key)) is not None:
            self._totals.cache_hits += 1
            self._refusals.answered()
            return known, True
        task = self._under_way.get(key)
        if task is None:
            self._refusals.sent(key)
            task = self._under_way[key] = asyncio.create_task(self._pay(key, body))
            task.add_done_callback(lambda done: self._forget(key, done))
        else:
            self._totals.shared += 1
        answer = await asyncio.shield(task)  # whoever asked may be gone: what is under way is paid, and kept
        return answer if isinstance(answer, Problem) else (answer, False)

    def _forget(self, key: str, done: asyncio.Task[Any]) -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # else asyncio complains where nobody waits for it any more

    async def _pay(self, key: str, body: dict[str, Any]) -> Answer | Problem:
        limit = int(body[self._options.max_tokens_field])
        expected = limit + sum(len(message["content"]) for message in body["messages"]) / CHARACTERS_PER_TOKEN
        answer = await self._patience.repeat(lambda: self._endpoint.chat(body), expected)
        self._refusals.ended(key, answer)
        if isinstance(answer, Problem):
            return answer
        self._cache.put(key, answer)
        totals, used = self._totals, answer.prompt_tokens + answer.completion_tokens
        totals.answers += 1
        totals.prompt_tokens += answer.prompt_tokens
        totals.completion_tokens += answer.completion_tokens
        self._pace.answered(expected, used or expected)
        return answer

    async def _only_model(self) -> str:
        names = await self._patience.repeat(self._endpoint.models, 0)
        if isinstance(names, Problem) or len(names) != 1:
            said = names.text if isinstance(names, Problem) else f"it has {', '.join(names) or 'none'}"
            raise ServiceRefused(f"{self._section}.model is null, so the endpoint should have one; but {said}")
        return names[0]
