"""What `/openapi.json` says is what a service does: its examples work, and every answer is as it is documented."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from jsonschema import Draft202012Validator

from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.services import listener
from hpc_rl.services.frame import Desk
from hpc_rl.services.openapi import REFUSALS

from .every_service import SERVICES, Served, serve

PLACEHOLDER = "/path/to"
OWN = {"/health", "/ready", "/metrics"}
LIMITS: dict[str, Any] = {"max_request_items": 4, "max_body_bytes": 5_000, "body_timeout_s": 60}


class Documented:
    """A server, and what it says of itself."""

    def __init__(self, served: Served) -> None:
        self.served, self.ask = served, served.ask
        self.document: dict[str, Any] = self.ask("GET", "/openapi.json").json()

    def filled(self, example: Any) -> Any:
        """An example with the placeholder for the image root filled."""
        return json.loads(json.dumps(example).replace(PLACEHOLDER, str(self.served.root)))

    def check(self, answer: httpx.Response) -> None:
        """Assert that this answer is documented."""
        path = answer.request.url.path
        documented = self.document["paths"][path][answer.request.method.lower()]["responses"]
        assert str(answer.status_code) in documented, f"{path} answers {answer.status_code}: {answer.text}"
        response = documented[str(answer.status_code)]
        for name, header in response.get("headers", {}).items():
            assert name in answer.headers and (header["schema"]["type"] == "string" or int(answer.headers[name]) > 0)
        kind = answer.headers["content-type"].partition(";")[0]
        if kind == "application/json":
            self.validate(response["content"][kind]["schema"], answer.json())
        else:
            assert response["content"][kind]["schema"] == {"type": "string"}

    def validate(self, schema: dict[str, Any], value: Any) -> None:
        """Assert that a value is as the schema says, with no field that it does not name."""
        components = copy.deepcopy(self.document["components"])
        for component in components["schemas"].values():
            component.setdefault("additionalProperties", False)
        Draft202012Validator({**schema, "components": components}).validate(value)

    def routes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The service's own, each with its operation."""
        for path, operations in self.document["paths"].items():
            if path not in OWN and "post" in operations:
                yield path, operations["post"]

    def body_schema(self, operation: dict[str, Any]) -> dict[str, Any]:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        return self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


@pytest.fixture(scope="module", params=SERVICES)
def served(request: Any, tmp_path_factory: pytest.TempPathFactory, model: YesNoModel) -> Iterator[Documented]:
    with serve(request.param, model, tmp_path_factory.mktemp(request.param), **LIMITS) as made:
        yield Documented(made)


def test_the_document_is_openapi(served: Documented) -> None:
    schemathesis.openapi.from_dict(served.document).validate()
    assert served.document["openapi"].startswith("3.1") and served.document["info"]["summary"]


def test_the_document_names_every_route_there_is(served: Documented) -> None:
    there = {route.path for route in served.served.hosted.service.app.routes}
    pages = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
    assert set(served.document["paths"]) == there - pages and set(served.document["paths"]) >= OWN


def test_every_route_wants_the_token_and_tells_all_that_it_may_refuse(served: Documented) -> None:
    assert served.document["security"] == [{"token": []}]
    assert served.document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for _, operation in served.routes():
        assert "security" not in operation  # the document's holds
        assert set(operation["responses"]) >= {"200", *map(str, REFUSALS)}
        assert operation["description"] and all("description" in said for said in operation["responses"].values())


def test_bodies_are_explained_and_no_field_is_taken_that_is_not_documented(served: Documented) -> None:
    for path, operation in served.routes():
        schema = served.body_schema(operation)
        assert schema["additionalProperties"] is False and schema["description"]
        example = served.filled(schema["examples"][0])
        answer = served.ask("POST", path, json={**example, "surprise": 1})
        assert answer.status_code == 422
        served.check(answer)


def test_every_documented_example_is_answered_and_the_answer_is_as_documented(served: Documented) -> None:
    for path, operation in served.routes():
        for example in served.body_schema(operation)["examples"]:
            served.validate(
                {"$ref": operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]}, example
            )
            answer = served.ask("POST", path, json=served.filled(example))
            assert answer.status_code == 200, answer.text
            results = answer.json().get("results", [answer.json()])
            assert not any("error" in result or any(result.get("errors", ())) for result in results)
            served.check(answer)


def test_every_documented_example_of_an_answer_is_one(served: Documented) -> None:
    schemas = served.document["components"]["schemas"]
    answers = [name for name, schema in schemas.items() if name.endswith("Answer") and "examples" in schema]
    assert answers
    for name in answers:
        for example in schemas[name]["examples"]:
            served.validate({"$ref": f"#/components/schemas/{name}"}, example)


def test_every_page_that_a_service_has_is_as_documented(served: Documented) -> None:
    for path, operations in served.document["paths"].items():
        if "get" in operations:
            assert served.ask("GET", path).status_code == 200
            for headers in (served.served.known, {}, {"Host": "another.example"}):
                served.check(served.ask("GET", path, headers=headers))


@pytest.mark.parametrize("path", sorted(OWN))
def test_the_routes_of_the_server_itself_are_as_documented(served: Served, path: str) -> None:
    answer = served.ask("GET", path)
    assert answer.status_code == 200
    served.check(answer)
    served.check(served.ask("GET", path, headers={}))
    served.check(served.ask("GET", path, headers={"Host": "another.example"}))
    assert served.ask("POST", path).status_code == 405


def test_refusals_are_as_documented(served: Documented) -> None:
    for path, operation in served.routes():
        example = served.filled(served.body_schema(operation)["examples"][0])
        known = {"Authorization": f"Bearer {served.served.token}", "Content-Type": "application/json"}
        refusals: dict[int, list[dict[str, Any]]] = {
            400: [{"content": b"\xff{}", "headers": known}],
            401: [{"json": example, "headers": {}}],
            413: [{"content": b" " * 6_000, "headers": known}],
            421: [{"json": example, "headers": {**known, "Host": "another.example"}}],
            422: [{"json": []}, {"json": {}}, {"content": b"{", "headers": known}],
        }
        if "batch" in example:
            refusals[413].append({"json": {"batch": example["batch"] * 5}})
        for status, requests in refusals.items():
            for request in requests:
                answer = served.ask("POST", path, **request)
                assert answer.status_code == status, (status, answer.text)
                served.check(answer)


def test_a_server_that_leaves_refuses_as_documented(served: Documented) -> None:
    served.served.hosted.server.guard.draining = True
    try:
        for path, operation in served.routes():
            answer = served.ask("POST", path, json=served.filled(served.body_schema(operation)["examples"][0]))
            assert answer.status_code == 503
            served.check(answer)
        for path in OWN:
            served.check(served.ask("GET", path))
        assert served.ask("GET", "/health").json()["status"] == "draining"
    finally:
        served.served.hosted.server.guard.draining = False


def test_the_example_of_the_listener_is_the_one_that_its_users_know() -> None:
    desk: listener.ListenerDesk = Desk(lambda pairs: [0.5] * len(pairs), ListenerServiceConfig())
    schemas = listener.create_app(desk).openapi()["components"]["schemas"]
    assert schemas["BatchBody"]["examples"] == [
        {
            "batch": [
                {
                    "candidate_paths": ["/path/to/img1.jpg", "/path/to/img2.jpg"],
                    "question": "Does the description match the dog in the image?",
                    "topk": 1,
                }
            ]
        }
    ]
    assert schemas["BatchAnswer"]["examples"] == [
        {"results": [{"yes_probabilities": [0.95, 0.23], "predicted_index": 0}], "took": 0.234}
    ]
