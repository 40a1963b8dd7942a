"""A run of the no-op recipe in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run.code import source_root

NOOP = source_root() / "benchmarks" / "noop.yaml"

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Opens the no-op run with `--set` values; 3 rounds of sample (4 shards) → grade → score → train → evaluate."""

    def make(*overrides: str) -> Run:
        config = configs.load(NOOP, overrides, {}, tmp_path / "run", cwd=tmp_path)
        return open_run(config, NOOP)

    return make
