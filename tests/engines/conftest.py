"""A tiny speaker with random weights, an adapter for it, requests with pictures of several sizes; pools of letters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_rl.engines.base import Completion, Prompt, Request
from hpc_rl.engines.pool import EnginePool
from tools.tiny_model import build, save

from .letters import OpenLetters
from .pools import Open

PIXELS = {"min_pixels": 784, "max_pixels": 12544}
TEXT = "Describe the main subject."
NO_THOUGHTS = {"enable_thinking": False}
"""A variable that the tiny model's chat template reads, as Qwen3's does."""


@pytest.fixture(scope="session")
def speaker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("models") / "speaker"
    save(*build([TEXT, "A photo of a red square with dots."], seed=1), folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(speaker_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder whose adapter changes what the speaker says."""
    from peft import LoraConfig, get_peft_model

    from hpc_rl.engines.loading import load_model

    torch.manual_seed(5)
    model = load_model(speaker_folder, "float32", "sdpa", torch.device("cpu"))
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's pools keep temporary files, and by which their processes are known."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # workers import what the test does
    return folder


@pytest.fixture
def open_pool(temporary: Path) -> Iterator[Open]:
    """Opens pools of the engine without a model (`letters.py`), which are closed after the test."""
    pools = []

    def open_one(open_worker: OpenLetters | None = None, count: int = 2, **more: object) -> EnginePool:
        more = {"gpus": [(str(number),) for number in range(count)], "pauses_s": (0.0, 0.1, 0.1), **more}
        pools.append(EnginePool(open_worker or OpenLetters(), count, **more))  # type: ignore[arg-type]
        return pools[-1]

    yield open_one
    for pool in pools:
        pool.close()


def pictures() -> list[Image.Image]:
    """Four pictures; one is tiny, one is long, one is far above the pixel limit."""
    rng = np.random.default_rng(0)
    sizes = [(56, 56), (20, 20), (40, 300), (300, 400)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def requests(samples: int = 4, first_seed: int = 0) -> list[Request]:
    """`samples` requests for each picture, all with seeds of their own."""
    return [
        Request(Prompt.of(TEXT, picture), first_seed + 100 * place + sample)
        for place, picture in enumerate(pictures())
        for sample in range(samples)
    ]


def by_path(asked: list[Request], folder: Path) -> list[Request]:
    """The same requests with their pictures as files in `folder`."""
    made = []
    for request in asked:
        (picture,) = request.prompt.open_images()
        path = folder / f"{picture.width}x{picture.height}.png"
        picture.save(path)
        made.append(Request(Prompt(request.prompt.messages, (path,)), request.seed))
    return made


def words_of(completions: Sequence[Completion]) -> tuple[str, ...]:
    """Pieces of two printable characters that were said; the speaker, with its random weights, says bytes."""
    found = (re.search(r"[!-~]{2}", completion.text) for completion in completions)
    return tuple(dict.fromkeys(match.group() for match in found if match))
