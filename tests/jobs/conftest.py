"""A prepared Lewis run with tiny models of random weights, for tests of single job bodies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.orchestrate.start import open_run
from hpc_rl.recipes import lewis
from hpc_rl.run.workspace import Workspace
from tools.tiny_model import build, save

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = (
    "data.categories=[ring, square]",
    "data.scenes.views_train=3",
    "data.scenes.views_test=2",
    "data.train_rows=24",
    "data.eval_rows.new_views=7",
    "data.eval_rows.validation=6",
    "sample.engine=transformers",
    "sample.prompts_per_round=8",
    "sample.samples_per_prompt=4",
    "sample.shard_size=3",
    "sample.max_tokens=16",
    "train.per_device_batch_size=16",
    "services.listener.client.chunk_size=8",
    "services.listener.client.deadline_s=180",
    "services.listener.client.backoff_factor=0.05",
    "run.linger_s=1",
    "run.lease_ttl_s=5",
)
CORPUS = [
    "yes no Yes No",
    "Does this description accurately describe the main subject in the image? Answer yes or no.",
    "A photo of a ring square. The ring is red green blue and plain striped dotted.",
]

NewRun = Callable[..., Workspace]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `speaker` and `listener`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("speaker", "listener")):
        save(*build(CORPUS, seed=seed, layers=2), folder / name)
    return folder


@pytest.fixture(scope="session")
def prepared(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which round 0 is prepared; to be copied, not used."""
    from jobs.lewis import dataset, prepare

    root = tmp_path_factory.mktemp("prepared") / "run"
    settings = (*SETTINGS, f"speaker.path={models / 'speaker'}", f"listener.path={models / 'listener'}")
    _open(root, settings)
    for body in (prepare, dataset):
        assert body.main(["--workspace", str(root), "--round", "0"]) == 0
    return root


def _open(root: Path, settings: tuple[str, ...]) -> None:
    file = REPOSITORY / "configs/tiny/lewis.yaml"
    loaded = configs.load(file, [*settings], {}, root, cwd=REPOSITORY)
    assert isinstance(loaded, lewis.LewisConfig)
    open_run(lewis.resolve(loaded), file)


@pytest.fixture
def new_run(prepared: Path, models: Path, tmp_path: Path) -> NewRun:
    """Make a copy of the prepared workspace, with settings of its own."""
    made: list[Path] = []

    def make(*settings: str) -> Workspace:
        root = tmp_path / f"run{len(made)}"
        made.append(root)
        shutil.copytree(prepared, root)
        (root / "training_config.json").unlink()
        paths = (f"speaker.path={models / 'speaker'}", f"listener.path={models / 'listener'}")
        _open(root, (*SETTINGS, *paths, *settings))
        return Workspace(root)

    return make
