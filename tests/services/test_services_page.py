"""docs/services.md to the letter: its curl commands against real servers, its own service, its scrape config."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from hpc_rl.config.clients import ClientConfig
from hpc_rl.config.environment import NAMES
from hpc_rl.config.services import ServiceConfig
from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.address import Address
from hpc_rl.services.calling import ServiceClient
from hpc_rl.services.guard import OWN_ROUTES
from hpc_rl.services.hosting import Hosted, host
from hpc_rl.services.metrics import Metrics
from hpc_rl.services.openapi import REFUSALS
from tests.waiting import PATIENCE_S

from .conftest import Lab
from .every_service import SERVICES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "services.md"
BLOCKS = re.findall(r"(?:^    .*\n|^\n+(?=    ))+", PAGE.read_text(), flags=re.M)
LOOPBACK = Address("127.0.0.1", "127.0.0.1")


def is_whole(command: str) -> bool:
    """Whether a shell would begin to run this, instead of asking for more lines."""
    parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True)
    return parsed.returncode == 0 and not command.endswith("\\")


def examples() -> list[tuple[str, str]]:
    """Every command that the page shows after `$`, and what it shows below it."""
    found: list[tuple[str, str]] = []
    whole = True
    for line in "".join(BLOCKS).splitlines():
        line = line.removeprefix("    ")
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), ""))
        elif found and not whole:
            found[-1] = (f"{found[-1][0]}\n{line}", "")
        elif found and line.startswith("{"):
            found[-1] = (found[-1][0], line)
        whole = not found or is_whole(found[-1][0])
    return found


def agrees(said: Any, shown: Any) -> bool:
    """The same, but for numbers, and for strings that the page leaves open."""
    if isinstance(shown, dict):
        return isinstance(said, dict) and list(said) == list(shown) and all(agrees(said[k], shown[k]) for k in shown)
    if isinstance(shown, list):
        return isinstance(said, list) and len(said) == len(shown) and all(map(agrees, said, shown))
    if isinstance(shown, str):
        return isinstance(said, str) and (shown == "…" or said == shown)
    return type(said) is type(shown)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, model: YesNoModel) -> Iterator[dict[str, Hosted]]:
    """All services of the page in one workspace, and the images that it names."""
    root = tmp_path_factory.mktemp("page")
    (root / "images").mkdir()
    for number, color in ((1, "red"), (2, "blue")):
        Image.new("RGB", (56, 56), color).save(root / "images" / f"img{number}.jpg")
    made = {
        name: host(
            open_service(model, root / "images", {}),
            folder=Workspace(root / "W").service_dir(name),
            address=LOOPBACK,
            options=ServiceConfig(),
            environ={},
        )
        for name, open_service in SERVICES.items()
    }
    yield made
    for hosted in made.values():
        hosted.leave(0.0)


def test_the_curl_commands_work_to_the_letter_and_say_what_is_shown(servers: dict[str, Hosted]) -> None:
    root = servers["listener"].publication.folder.parents[2]
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    run = examples()
    header = next(command for command, _ in run if "umask" in command)
    run += [(header.replace("listener", name), "") for name in servers]
    asked: set[tuple[str, str]] = set()
    for command, shown in sorted(run, key=lambda example: "umask" not in example[0]):
        name = (re.findall(r"@(\w+)\.header", command) or ["listener"])[0]
        endpoint = servers[name].publication.endpoint
        filled = command.replace("<host>", endpoint.host).replace("<port>", str(endpoint.port))
        filled = filled.replace("/path/to", str(root / "images"))
        done = subprocess.run(
            ["bash", "-c", filled], cwd=root, env=environ, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, (command, done.stderr)
        if shown:
            assert agrees(json.loads(done.stdout), json.loads(shown)), (command, done.stdout)
            asked.add((name, re.findall(r"<port>(/[\w/]+)", command)[0]))
    assert (root / "listener.header").stat().st_mode & 0o777 == 0o600
    routes = {(name, path) for name, hosted in servers.items() for path in hosted.service.app.openapi()["paths"]}
    assert asked == {route for route in routes if route[1] not in OWN_ROUTES} | {
        ("listener", "/health"),
        ("listener", "/ready"),
    }


@pytest.fixture
def lengths(tmp_path: Path) -> ModuleType:
    """The service that the page writes, as a module."""
    code = next(block for block in BLOCKS if block.lstrip().startswith('"""The HTTP service'))
    file = tmp_path / "lengths.py"
    file.write_text("\n".join(line.removeprefix("    ") for line in code.splitlines()))
    spec = importlib.util.spec_from_file_location("lengths", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_service_that_the_page_writes_serves(lengths: ModuleType, lab: Lab) -> None:
    options = ServiceConfig()
    service = lengths.open_service(lab.ws, lab.config(), 0, options)
    hosted = host(service, folder=lab.ws.service_dir("lengths"), address=LOOPBACK, options=options, environ={})
    try:
        (asking,) = (block for block in BLOCKS if "ServiceClient" in block)
        question, shown = re.findall(r'client\.post\("/lengths", (\{.*\})\)  # (\{.*\})', asking)[0]
        with ServiceClient(lab.ws.service_dir("lengths"), ClientConfig(deadline_s=PATIENCE_S)) as client:
            assert client.post("/lengths", json.loads(question)) == json.loads(shown)
    finally:
        hosted.leave(1.0)


def test_the_scrape_config_is_yaml_with_the_token_of_a_service() -> None:
    (block,) = (block for block in BLOCKS if "scrape_configs" in block)
    (job,) = yaml.safe_load(block)["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "W/services/listener/token"}
    assert job["static_configs"] == [{"targets": ["<host>:<port>"]}]


def test_the_page_names_every_variable_with_its_field_and_default() -> None:
    rows = dict(re.findall(r"^\| `(LISTENER_\w+)` \| `(\w+)`", PAGE.read_text(), flags=re.M))
    fields = {name: field.rpartition(".")[2] for name, field in NAMES.items() if ".listener.client." in field}
    assert rows == fields
    defaults = dict(re.findall(r"^\| `LISTENER_\w+` \| `(\w+)`.*\| ([\d.]+) \|$", PAGE.read_text(), flags=re.M))
    assert {name: float(value) for name, value in defaults.items()} == {
        name: getattr(ClientConfig(), name) for name in set(fields.values()) - {"url"}
    }
    of_services = [name for name, field in NAMES.items() if field.startswith("services.")]
    assert [name for name in of_services if f"`{name}`" not in PAGE.read_text()] == []


def test_the_page_names_every_refusal_and_every_figure(servers: dict[str, Hosted]) -> None:
    rows = re.findall(r"^\| (\d{3}) \|", PAGE.read_text(), flags=re.M)
    assert rows == [str(status) for status in REFUSALS]
    metrics = Metrics(servers["listener"].service)
    metrics.watch(servers["listener"].server)
    (table,) = re.findall(r"^\| `hpc_rl_service_…`(?:.*\n)+?\n", PAGE.read_text(), flags=re.M)
    families = text_string_to_metric_families(metrics.text().decode())
    there = {family.name + "_total" * (family.type == "counter") for family in families}
    names = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.split("\n") if row))
    shown = {f"hpc_rl_service_{name}" for name in names}
    assert shown == {name for name in there if name.startswith("hpc_rl_service_") and not name.endswith("_created")}
