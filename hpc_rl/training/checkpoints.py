"""Checkpoints of a training job: whole or ignored, ours or refused; and what tells weights apart.

A checkpoint counts when `COMPLETE.json` lies in it, written last; a kill in the middle of a save leaves a folder that
nobody reads. It is continued only by a job with the same plan, on as many ranks, with the same settings.

Optimizer states are pickles, and a pickle runs code when it is read: transformers reads its own with `weights_only`,
DeepSpeed does not (torch.load). So checkpoints are made in folders that only this user may enter, and one is read only
if it and all its files belong to this user and nobody else may write to them. What leaves a round is safetensors.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.run import atomic
from hpc_rl.run.private import untrusted

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE.json"
PICKLED_ARGUMENTS = "training_args.bin"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and how many optimizer steps had been done."""

    folder: Path
    step: int


class Checkpoints:
    """The checkpoints of a stage: one folder per claim of the stage, with a folder per step.

    Parameters
    ----------
    folder
        Of all checkpoints of the stage.
    token
        Unique to this claim, so that a job that was only taken for dead writes nowhere near its successor.
    fingerprint
        Of everything that must be equal to continue.
    """

    def __init__(self, folder: Path, token: str, fingerprint: str) -> None:
        self.folder, self.own, self.fingerprint = folder, folder / token, fingerprint

    def create(self) -> None:
        """Make our own folder, which nobody else may enter."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.own.mkdir(mode=0o700, exist_ok=True)
        self.own.chmod(0o700)  # whatever the folder's default ACL says

    def latest(self) -> Checkpoint | None:
        """The whole checkpoint with the most steps that this job may continue; None to begin anew."""
        for folder in sorted(self.folder.glob("*/checkpoint-*"), key=lambda path: -_step(path)):
            reason = self._refusal(folder)
            if reason is None:
                return Checkpoint(folder, _step(folder))
            log.info("not continuing %s: %s", folder, reason)
        return None

    def _refusal(self, folder: Path) -> str | None:
        """Why a checkpoint is not continued; None if it may be."""
        try:
            marker = atomic.read_json(folder / COMPLETE)
        except FileNotFoundError:
            return "it is not whole (killed while saving)"
        except atomic.CorruptFile as error:
            return str(error)
        if marker["fingerprint"] != self.fingerprint:
            return "it was made for other samples, settings or ranks"
        for name, size in marker["files_bytes"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} is missing or has another size than when it was written"
        return untrusted(folder)

    def seal(self, folder: Path, keep: int) -> None:
        """Declare a checkpoint whole (rank 0, after all ranks have written and synced theirs) and remove those before.

        Parameters
        ----------
        keep
            How many whole ones stay.
        """
        (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(_files(folder))}
        marker = {
            "step": _step(folder), "fingerprint": self.fingerprint, "written": time.time(), "files_bytes": sizes,
        }  # fmt: skip
        atomic.write_json(folder / COMPLETE, marker)
        for older in self._whole()[keep:]:
            (older / COMPLETE).unlink()  # first: half a folder must not look whole
            shutil.rmtree(older)

    def _whole(self) -> list[Path]:
        """Our whole checkpoints and those that we could have continued, most steps first."""
        found = [path.parent for path in self.folder.glob(f"*/checkpoint-*/{COMPLETE}")]
        ours = [folder for folder in found if atomic.read_json(folder / COMPLETE)["fingerprint"] == self.fingerprint]
        return sorted(ours, key=lambda folder: -_step(folder))

    def remove(self) -> None:
        """Remove all checkpoints of the stage, of every claim: its final weights are there and verified (L23)."""
        shutil.rmtree(self.folder, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Force what this host wrote below `folder` to disk."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1
