"""A tiny listener with random weights, pictures for it, and servers that really serve them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff, listener
from hpc_rl.services.address import Address
from hpc_rl.services.hosting import Hosted, host
from hpc_rl.services.images import ImageRoots
from hpc_rl.services.pair_scorer import PairScorer
from tests.waiting import PATIENCE_S
from tools.tiny_model import build, save

PIXELS = {"min_pixels": 784, "max_pixels": 12544}
CORPUS = [
    "yes",
    "no",
    " yes no Yes No",
    'Does this description "A. B." describe the image? Answer yes or no.',
    "red blue",
]


@pytest.fixture(scope="session")
def listener_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("models") / "listener"
    save(*build(CORPUS, seed=3), folder)
    return folder


@pytest.fixture(scope="session")
def model(listener_folder: Path) -> YesNoModel:
    return YesNoModel(str(listener_folder), **PIXELS)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image root with `a/0.png` … `a/5.png` of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "a").mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(56, 56), (56, 112), (84, 56), (56, 56), (120, 30), (40, 200)]):
        noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "a" / f"{number}.png")
    return root


@dataclass
class Lab:
    """A workspace, and servers for it."""

    ws: Workspace
    model: Any
    pictures: Path
    hosted: list[Hosted]

    def config(self, client: dict[str, Any] | None = None, **options: Any) -> LewisConfig:
        """A config with these service options, and clients that are quick to repeat."""
        fast = {"timeout_s": PATIENCE_S, "deadline_s": PATIENCE_S, "backoff_factor": 0.02, **(client or {})}
        return LewisConfig.model_validate(
            {
                "run": {"name": "t", "workspace": self.ws.root},
                "speaker": {"path": "unused"},
                "listener": {"path": "unused", **PIXELS},
                "data": {"image_root": self.pictures},
                "services": {"listener": {"client": fast, **options}},
            }
        )

    def serve(self, replica: str = "r0", model: Any = None, **options: Any) -> Hosted:
        """One more replica of the listener."""
        settings = self.config(**options).services.listener
        scorer = PairScorer(model or self.model, ImageRoots([self.pictures], settings))
        self.hosted.append(
            host(
                listener.service_of(scorer, settings),
                folder=self.ws.service_dir("listener"),
                address=Address("127.0.0.1", "127.0.0.1"),
                options=settings,
                environ={"HPC_RL_JOB_ID": replica},
            )
        )
        return self.hosted[-1]

    @property
    def token(self) -> str:
        return handoff.read_token(self.ws.service_dir("listener"))


@pytest.fixture
def lab(tmp_path: Path, model: YesNoModel, pictures: Path) -> Iterator[Lab]:
    made = Lab(Workspace(tmp_path / "run"), model, pictures, [])
    yield made
    for hosted in made.hosted:
        hosted.leave(0.0)


Serve = Callable[..., Hosted]
