"""The speaker over HTTP, served by hand as its documentation says, with the shipped tiny speaker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.run import atomic
from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff
from hpc_rl.services.records import Endpoint
from tests.forked import Forked
from tests.waiting import PATIENCE_S, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Service:
    """The service's process and record."""

    ws: Workspace
    process: Forked
    endpoint: Endpoint

    def post(self, route: str, body: Any, token: str | None = None) -> httpx.Response:
        token = handoff.read_token(self.ws.service_dir("speaker")) if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.post(
            f"{self.endpoint.url}{route}", json=body, headers=headers, trust_env=False, timeout=PATIENCE_S
        )


def picture(path: Path, height: int, width: int) -> None:
    noise = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


def serve(ws: Workspace, round: int) -> tuple[Forked, Path]:
    """The process and its log."""
    log = ws.root / f"serve-{round}.log"
    return Forked("jobs.serve", f"--workspace {ws.root} --round {round} --service speaker".split(), log), log


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run that was made and not started, and pictures in its image root."""
    ws = Workspace(tmp_path_factory.mktemp("speaker") / "run")
    launch = f"-m hpc_rl.launch configs/tiny/lewis.yaml --init --workspace {ws.root} --set sample.engine=transformers"
    subprocess.run([sys.executable, *launch.split()], cwd=REPOSITORY, env=QUIET, check=True, capture_output=True)
    picture(ws.images_dir / "a" / "0.png", 56, 56)
    picture(ws.images_dir / "a" / "1.png", 84, 56)
    picture(ws.images_dir / "a" / "strip.png", 2, 600)
    picture(ws.root / "secret.png", 56, 56)
    return ws


@pytest.fixture(scope="module")
def service(workspace: Workspace) -> Iterator[Service]:
    folder = workspace.service_dir("speaker")
    process, log = serve(workspace, 0)
    found = wait_for(lambda: handoff.discover(folder), log.read_text, of=process)
    yield Service(workspace, process, found[0])
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert handoff.discover(folder) == []  # it took its record away


def plain(ws: Workspace, image: str) -> str:
    """What the engine says without a service around it."""
    from hpc_rl import config as configs
    from hpc_rl.data.images import load_image
    from hpc_rl.engines.base import Prompt, Request, Sampling, generate
    from hpc_rl.engines.engine_spec import EngineSpec
    from hpc_rl.engines.opening import open_engine
    from hpc_rl.engines.weights import Weights

    config = configs.from_json(atomic.read_json(ws.config_path))
    assert isinstance(config, LewisConfig)
    weights = Weights(config.speaker.path, None, "")
    engine = open_engine(EngineSpec("transformers", config.speaker, config.sample, weights))
    prompt = Prompt.of(config.data.speaker_problem, load_image(ws.images_dir / image))
    (made,) = generate(engine, [Request(prompt, 0)], Sampling(0.0, config.sample.max_tokens))
    return made.text


def test_an_image_is_described_in_parts_as_the_engine_would_say_it(service: Service) -> None:
    answer = service.post("/describe", {"image_path": "a/0.png"})
    assert answer.status_code == 200
    said = answer.json()
    assert said["text"] == plain(service.ws, "a/0.png")
    assert said["thinking"] and said["coarse"] and said["detailed"]
    for tag in ("thinking", "coarse", "detailed"):
        assert f"<{tag}>{said[tag]}</{tag}>" in said["text"].replace("> ", ">").replace(" <", "<")


def test_in_a_batch_each_item_stands_for_itself(service: Service) -> None:
    paths = ["a/0.png", "a/none.png", "a/1.png", "a/strip.png", "../secret.png", "a/0.png"]
    answer = service.post("/batch_describe", {"batch": [{"image_path": path} for path in paths]}).json()
    results = answer["results"]
    assert [list(result) == ["error"] for result in results] == [False, True, False, True, True, False]
    assert "aspect ratio" in results[3]["error"]
    assert results[0] == results[5] == service.post("/describe", {"image_path": "a/0.png"}).json()
    assert answer["took"] > 0
    assert service.post("/batch_describe", {"batch": []}).json()["results"] == []


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "a", "{root}/secret.png"])
def test_a_path_that_leads_out_is_refused_and_not_repeated(service: Service, path: str) -> None:
    named = path.format(root=service.ws.root)
    answer = service.post("/describe", {"image_path": named})
    assert answer.status_code == 422
    assert len(named) == 1 or named not in answer.text


@pytest.mark.parametrize("route", ["/describe", "/batch_describe", "/docs", "/nowhere"])
def test_every_route_wants_the_token(service: Service, route: str) -> None:
    for token in ("", "x"):
        assert service.post(route, {"image_path": "a/0.png"}, token=token).status_code == 401


def test_a_round_that_is_not_trained_has_no_speaker(workspace: Workspace) -> None:
    process, log = serve(workspace, 2)
    assert process.wait(PATIENCE_S) == 1
    assert "is not done: there are no weights yet" in log.read_text()
