"""Every algorithm trains on two ranks, plain and with DeepSpeed, as it does in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from hpc_rl.run.workspace import Workspace
from tests.training.conftest import start_ranks
from tests.training.pool import (
    MODES,
    WITH_LORA,
    Notes,
    open_run_of_one,
    open_run_of_one_with_lora,
    open_run_of_two,
    train_all,
    trained_in,
)
from tests.waiting import PATIENCE_S


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Notes]]:
    """What was trained with which losses, by mode and algorithm; `one` and `one_lora` are this process alone."""
    folder = tmp_path_factory.mktemp("pool")
    one = open_run_of_one(folder)
    for mode in ("one_lora", "lora", *MODES):
        shutil.copytree(one / "rounds", folder / mode / "rounds")
    with_lora = open_run_of_one_with_lora(folder)
    for mode in ("lora", *MODES):
        open_run_of_two(folder, mode)
    ranks = start_ranks(Workspace(folder), 2, "pool", ("tests.training.pool",))
    try:
        alone = {"one": train_all(one), "one_lora": train_all(with_lora, WITH_LORA)}
        assert ranks.wait(3 * PATIENCE_S) == [0, 0], ranks.said()
    finally:
        ranks.kill()
    yield {**alone, **json.loads((folder / "notes.json").read_text())}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("mode", "algorithm"), [(mode, name) for mode in MODES for name in trained_in(mode)])
def test_two_ranks_have_the_losses_of_one_process(pool: dict[str, Notes], algorithm: str, mode: str) -> None:
    alone, both = pool["one"][algorithm], pool[mode][algorithm]
    assert alone["engine"].startswith("Qwen2For") and (both["engine"], both["zero_stage"]) == MODES[mode]
    assert_same(alone, both)


@pytest.mark.parametrize("algorithm", WITH_LORA)
def test_two_ranks_with_adapters_have_the_losses_of_one_process(pool: dict[str, Notes], algorithm: str) -> None:
    alone, both = pool["one_lora"][algorithm], pool["lora"][algorithm]
    assert alone["engine"].startswith("Peft") and (both["engine"], both["zero_stage"]) == MODES["zero2"]
    assert_same(alone, both)


def assert_same(alone: dict[str, Any], both: dict[str, Any]) -> None:
    assert len(alone["losses"]) == len(both["losses"]) >= 3
    assert both["losses"] == pytest.approx(alone["losses"], abs=5e-6, rel=1e-5)
    assert both["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)
    assert both["validation"] == pytest.approx(alone["validation"], abs=2e-5)
