"""Every algorithm trains on two ranks, plain and with DeepSpeed, as it does in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run.workspace import Workspace
from tests.training import algorithms_body
from tests.training.algorithms_recipe import FILES
from tests.training.conftest import REPOSITORY, start_ranks
from tests.training.pool import MODES, Notes, train_all
from tests.waiting import PATIENCE_S
from tools import tiny_chat_model

CONFIG = REPOSITORY / "tests/training/algorithms.yaml"


def open_(root: Path, model: Path, mode: str) -> None:
    """Write the config of a workspace whose trainings have one rank, or two in one of the modes."""
    settings = [f"model.path={model}", "run.seed=3"]
    for name in FILES:
        if mode in MODES:
            settings += [f"stages.train_{name}.nodes=2", f"{name}.per_device_batch_size=2"]
        if mode.startswith("zero"):
            settings.append(f"{name}.deepspeed=configs/deepspeed/{mode}.json")
    open_run(configs.load(CONFIG, settings, {}, root, cwd=REPOSITORY), CONFIG)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Notes]]:
    """What was trained with which losses, by mode and algorithm; `one` is this process alone."""
    folder = tmp_path_factory.mktemp("pool")
    model = tiny_chat_model.write(folder / "model")
    open_(folder / "one", model, "one")
    assert algorithms_body.main(["--workspace", str(folder / "one"), "--round", "1"]) == 0
    for mode in MODES:
        shutil.copytree(folder / "one/rounds", folder / mode / "rounds")
        open_(folder / mode, model, mode)
    ranks = start_ranks(Workspace(folder), 2, "pool", ("-m", "tests.training.pool"))
    try:
        alone = train_all(folder / "one")
        assert ranks.wait(3 * PATIENCE_S) == [0, 0], ranks.said()
    finally:
        ranks.kill()
    yield {"one": alone, **json.loads((folder / "notes.json").read_text())}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("algorithm", FILES)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_have_the_losses_of_one_process(pool: dict[str, Notes], algorithm: str, mode: str) -> None:
    alone, both = pool["one"][algorithm], pool[mode][algorithm]
    assert alone["engine"].startswith("Qwen2For") and (both["engine"], both["zero_stage"]) == MODES[mode]
    assert len(alone["losses"]) == len(both["losses"]) >= 3
    assert both["losses"] == pytest.approx(alone["losses"], abs=5e-6, rel=1e-5)
    assert both["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)
