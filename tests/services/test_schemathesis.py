"""Hundreds of requests made up from a service's own OpenAPI document: none fails it, each answer is as documented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hpc_rl.engines.yes_no import YesNoModel

from .every_service import SERVICES, Served, serve

EXAMPLES = 120
"""Of each service, as documented and not as documented each."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


@pytest.fixture(scope="module", params=SERVICES)
def served(request: Any, tmp_path_factory: pytest.TempPathFactory, model: YesNoModel) -> Iterator[Served]:
    with serve(request.param, model, tmp_path_factory.mktemp(request.param), batch_wait_ms=0) as made:
        yield made


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_is_asked_the_answer_is_documented_and_no_500(served: Served, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(served.ask("GET", "/openapi.json").json())
    schema.config.update(base_url=served.hosted.publication.endpoint.url)
    cases = st.one_of([operation.ok().as_strategy(generation_mode=mode) for operation in schema.get_all_operations()])

    answers: Counter[tuple[str, int]] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(cases)
    def ask(case: Any) -> None:
        answer = case.call_and_validate(headers=served.known, checks=CHECKS)
        answers[case.operation.path, answer.status_code] += 1

    ask()
    paths = schema.raw_schema["paths"]
    bodies = {path for path in paths if "post" in paths[path]}  # the others cannot be asked wrongly
    assert {path for path, _ in answers} >= (set(paths) if mode is GenerationMode.POSITIVE else bodies)
    assert answers.total() >= EXAMPLES / 2
    assert any(status == (200 if mode is GenerationMode.POSITIVE else 422) for _, status in answers)
    assert served.is_well()
