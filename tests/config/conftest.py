"""A config that needs nothing but itself, and a folder for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.loader import load

MINIMAL = """\
recipe: lewis
run: {name: small}
speaker: {path: models/speaker}
listener: {path: models/listener}
data: {scenes: {}}
"""

Load = Callable[..., LewisConfig]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(MINIMAL)
    return file


@pytest.fixture
def small(minimal: Path, tmp_path: Path) -> Load:
    """Loads the small config with `--set` values, in a folder of its own and without environment variables."""

    def load_small(*overrides: str, env: dict[str, str] | None = None) -> LewisConfig:
        config = load(minimal, overrides, env or {}, cwd=tmp_path)
        assert isinstance(config, LewisConfig)
        return config

    return load_small
