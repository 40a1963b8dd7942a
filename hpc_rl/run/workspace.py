"""Where everything of a run lies. Paths only; what the files mean is said by the modules that write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCHEMA = 1
"""Version of the workspace's layout and JSON files; a manifest with a higher one than ours is refused."""


@dataclass(frozen=True)
class Workspace:
    """A run's folder on shared storage. Constructing one touches no disk."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser().absolute())

    @property
    def config_path(self) -> Path:
        """The resolved config that every job reads."""
        return self.root / "training_config.json"

    @property
    def state_path(self) -> Path:
        """The last reconcile's view, for people and tools; decisions never read it."""
        return self.root / "training_state.json"

    @property
    def ledger_path(self) -> Path:
        """Every submission, intent before sbatch and job id after."""
        return self.root / "ledger.jsonl"

    @property
    def lease_folder(self) -> Path:
        """Run-wide leases: one reconcile at a time, one foreground launcher at a time."""
        return self.root / "leases"

    @property
    def tb_dir(self) -> Path:
        """TensorBoard's log folder."""
        return self.root / "tb"

    @property
    def images_dir(self) -> Path:
        """Images that the run renders by itself."""
        return self.root / "images"

    @property
    def code_dir(self) -> Path:
        """Snapshots of the code that jobs import, one folder per content hash."""
        return self.root / "code"

    @property
    def teacher_cache(self) -> Path:
        """Answers of a teacher, kept for the whole run."""
        return self.root / "teacher_cache"

    @property
    def compile_cache(self) -> Path:
        """What engines compile, kept from round to round; it runs as code, so it is of this user alone."""
        return self.root / "cache" / "compile"

    def stage_dir(self, round: int, stage: str) -> Path:
        """Shards, manifests, leases and attempts of one stage of one round."""
        return self.root / "rounds" / f"round_{round:02d}" / stage

    def attempts_dir(self, round: int, stage: str) -> Path:
        """Specs and end records of a stage's submissions."""
        return self.stage_dir(round, stage) / "attempts"

    def dataset_dir(self, round: int) -> Path:
        """Data sets made in a round."""
        return self.root / "datasets" / f"round_{round:02d}"

    def checkpoint_dir(self, role: str, round: int) -> Path:
        """The Hugging Face folder of a role's weights after a round."""
        return self.root / "checkpoints" / role / f"round_{round:02d}"

    def service_dir(self, service: str) -> Path:
        """Handoff files of a service."""
        return self.root / "services" / service

    def log_dir(self, round: int, stage: str) -> Path:
        """Logs of a stage's jobs, one per task and restart."""
        return self.root / "logs" / f"round_{round:02d}" / stage

    def relative(self, path: Path) -> str:
        """`path` as written into JSON: relative to the workspace where it lies inside (so that a run may be moved)."""
        path = Path(path).absolute()
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def resolve(self, path: str) -> Path:
        """The inverse of `relative`."""
        return self.root / path
