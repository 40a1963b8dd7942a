"""A prepared Lewis run: a tiny speaker, sampled by transformers, graded with made-up rewards; ranks as processes."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.recipes import lewis
from hpc_rl.run.workspace import Workspace
from tests.forked import Forked
from tests.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = (
    "data.categories=[ring, square]",
    "data.scenes.views_train=3",
    "data.scenes.views_test=2",
    "data.train_rows=24",
    "data.eval_rows.new_views=7",
    "data.eval_rows.validation=6",
    "sample.engine=transformers",
    "sample.prompts_per_round=12",
    "sample.samples_per_prompt=4",
    "sample.shard_size=6",
    "sample.max_tokens=12",
    "train.per_device_batch_size=8",
    "train.warmup_steps=1",
    "train.save_steps=2",
    "run.linger_s=1",
    "run.lease_ttl_s=5",
    "cluster.file_system_lag_s=0",
)
CORPUS = [
    "yes no Yes No",
    "Does this description accurately describe the main subject in the image? Answer yes or no.",
    "A photo of a ring square. The ring is red green blue and plain striped dotted.",
]

PARTS = ("accuracy", "format", "length")
NewRun = Callable[..., Workspace]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are slower on two threads, and much slower on two busy cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL. Its last norm is scaled up, so that what it says depends on what it sees."""
    import torch

    from tools.tiny_model import build, save

    folder = tmp_path_factory.mktemp("models") / "speaker"
    model, processor = build(CORPUS, seed=0, layers=2)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(4)
        for block in model.model.visual.blocks:
            block.mlp.fc2.weight.mul_(3)
    save(model, processor, folder)
    return folder


@pytest.fixture(scope="session")
def sampled(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with round 1 sampled; to be copied, not used."""
    from jobs import sample
    from jobs.lewis import dataset, prepare

    root = tmp_path_factory.mktemp("sampled") / "run"
    open_(root, speaker)
    for body, round in ((prepare, 0), (dataset, 0), (sample, 1)):
        assert body.main(["--workspace", str(root), "--round", str(round)]) == 0
    return root


@pytest.fixture(scope="session")
def second(plain: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain run's workspace with round 2 sampled by its adapter, and graded; to be copied, not used."""
    from jobs import sample

    root = tmp_path_factory.mktemp("second") / "run"
    shutil.copytree(plain.root, root)
    assert sample.main(["--workspace", str(root), "--round", "2"]) == 0
    grade(root, round=2)
    return root


@pytest.fixture(scope="session")
def plain_second(second: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The plain run after round 2, trained by one undisturbed rank; to be looked at."""
    from jobs import train

    root = tmp_path_factory.mktemp("plain_second") / "run"
    shutil.copytree(second, root)
    assert train.main(["--workspace", str(root), "--round", "2"]) == 0
    return Workspace(root)


def open_(root: Path, speaker: Path, *settings: str) -> None:
    """Write a run's config."""
    file = REPOSITORY / "configs/tiny/lewis.yaml"
    paths = (f"speaker.path={speaker}", f"listener.path={speaker}")
    loaded = configs.load(file, [*SETTINGS, *paths, *settings], {}, root, cwd=REPOSITORY)
    assert isinstance(loaded, lewis.LewisConfig)
    open_run(lewis.resolve(loaded), file)


@pytest.fixture
def new_run(sampled: Path, speaker: Path, tmp_path: Path) -> NewRun:
    """Make a copy of the sampled workspace, with settings of its own, graded."""
    made: list[Path] = []

    def make(*settings: str, left_out: Sequence[str] = (), graded: bool = True, of: Path = sampled) -> Workspace:
        root = tmp_path / f"run{len(made)}"
        made.append(root)
        _copy(of, speaker, root, *settings)
        if graded:
            grade(root, left_out=left_out)
        return Workspace(root)

    return make


def _copy(sampled: Path, speaker: Path, root: Path, *settings: str) -> None:
    shutil.copytree(sampled, root)
    (root / "training_config.json").unlink()
    open_(root, speaker, *settings)


@pytest.fixture(scope="session")
def plain(sampled: Path, speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run without any settings of its own, trained by one undisturbed rank; to be looked at, or copied."""
    from jobs import train

    root = tmp_path_factory.mktemp("plain") / "run"
    _copy(sampled, speaker, root)
    grade(root)
    assert train.main(["--workspace", str(root), "--round", "1"]) == 0
    return Workspace(root)


def grade(root: Path, round: int = 1, left_out: Sequence[str] = ()) -> None:
    """Commit the grade stage with rewards that depend on the sample's id only."""
    from hpc_rl.grading.game import LewisGraded
    from hpc_rl.grading.samples import read_samples, write_samples

    job = load(root, round, "grade")
    job.folder.mkdir(parents=True, exist_ok=True)
    sampled = job.inputs(round, "sample")
    for shard in job.shards():
        graded = []
        for one in read_samples(sampled[shard.index].path("samples.parquet")):
            draw, gone = random.Random(one.sample_id), one.sample_id in left_out
            accuracy, form = float(draw.random() < 0.5), float(draw.random() < 0.7)
            graded.append(
                LewisGraded(
                    **vars(one),
                    reward_accuracy=None if gone else accuracy,
                    reward_format=form,
                    reward_length=0.1 * form,
                    reward=None if gone else accuracy + 1.1 * form,
                    left_out=gone,
                    predicted_index=0,
                    yes_probabilities=(0.5, 0.2, 0.1),
                )
            )
        path = shard.output("graded.parquet")
        write_samples(path, graded, LewisGraded)
        shard.commit([path], made_from={})


@dataclass
class Ranks:
    """The processes of one training job, as `srun` would start them."""

    ws: Workspace
    processes: list[Forked]
    logs: list[Path]

    def wait(self, timeout_s: float = 2 * PATIENCE_S) -> list[int]:
        """Exit codes of all ranks."""
        deadline = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """kill -9."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def said(self) -> str:
        """All logs."""
        return "\n".join(f"---- {log.name}\n{log.read_text()}" for log in self.logs)


def start_ranks(
    ws: Workspace, ranks: int = 1, job_id: str = "1", program: Sequence[str] = ("jobs.train",),
    environment: Mapping[str, str] | None = None, round: int = 1,
) -> Ranks:  # fmt: skip
    """Start `jobs.train` (or a program that stands in for it) on a number of ranks."""
    module, *arguments = program
    arguments += ["--workspace", str(ws.root), "--round", str(round)]
    processes, logs = [], []
    for rank in range(ranks):
        logs.append(ws.root / f"train-{job_id}-{rank}.out")
        variables = {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
            "HPC_RL_JOB_ID": job_id, "HPC_RL_RESTART": "0", **(environment or {}),
        }  # fmt: skip
        processes.append(Forked(module, arguments, logs[-1], variables))
    return Ranks(ws, processes, logs)


@pytest.fixture
def train() -> Callable[..., Ranks]:
    """Start training."""
    return start_ranks


@pytest.fixture(scope="session")
def forgetful() -> Path:
    """A model that mostly forgets the carry: what algorithms teach it (tools/tiny_sums.py)."""
    return REPOSITORY / "models/tiny-solver"
