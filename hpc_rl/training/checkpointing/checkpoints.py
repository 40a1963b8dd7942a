"""Checkpoints of a training job: whole or ignored, ours or refused.

A checkpoint counts when `COMPLETE.json` lies in it, written last; a kill in the middle of a save leaves a folder that
nobody reads. It is continued only by a job with the same plan, on as many ranks, with the same settings. Before those
that came before it are removed it is read back, by the rules by which the next attempt will choose one.

Optimizer states are pickles, and a pickle runs code when it is read: transformers reads its own with `weights_only`,
DeepSpeed does not (torch.load). So checkpoints are made in folders that only this user may enter, and one is read only
if it and all its files belong to this user and nobody else may write to them. What leaves a round is safetensors.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.run import atomic
from hpc_rl.run.private import untrusted
from hpc_rl.training.checkpointing.damage import damage, sizes
from hpc_rl.training.errors import CheckpointFailed

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE.json"
UNREADABLE = "UNREADABLE.json"
"""Beside it in a checkpoint that a training could not go on from: it is taken where there is no other."""
STATE = "trainer_state.json"
PICKLED_ARGUMENTS = "training_args.bin"
POLL_S = 0.2


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, optimizer steps done, when (seconds since the epoch), and its size in bytes."""

    folder: Path
    step: int
    written: float
    size: int


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
    keep
        How many whole ones stay.
    still_ours
        Whether the claim holds: a job that was only taken for dead removes nothing, its successor may read it.
    """

    def __init__(
        self, folder: Path, token: str, fingerprint: str, keep: int = 2, still_ours: Callable[[], bool] = lambda: True
    ) -> None:
        self.folder, self.own, self.fingerprint = folder, folder / token, fingerprint
        self._keep, self._still_ours = keep, still_ours
        self._sealed: set[Path] = set()

    def create(self) -> None:
        """Make our own folder, which nobody else may enter, and remove what attempts before left half written.

        The claim is ours, so nobody writes there any more; and they may be what fills the disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.own.mkdir(mode=0o700, exist_ok=True)
        self.own.chmod(0o700)  # whatever the folder's default ACL says
        for folder in self._all():
            if not (folder / COMPLETE).exists():
                log.info("removing %s: it is not whole (killed while saving)", folder)
                shutil.rmtree(folder, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The whole checkpoint with the most steps that this job may continue; None to begin anew.

        Those that could not be gone on from come last.
        """
        for folder in self._all():
            reason = self._refusal(folder)
            if reason is None:
                marker = atomic.read_json(folder / COMPLETE)
                return Checkpoint(folder, _step(folder), marker["written"], sum(marker["files_bytes"].values()))
            log.info("not continuing %s: %s", folder, reason)
        return None

    def distrust(self, folder: Path, why: str) -> str:
        """Take others before this checkpoint from now on: it looks whole, and a training could not go on from it.

        It is not removed: a disk or a network may only have been down. Any rank may say so.

        Returns
        -------
        str
            What the next attempt does, for its user.
        """
        atomic.write_json(folder / UNREADABLE, {"why": why})
        found = self.latest()
        if found is None or found.folder == folder:
            return f"There is no other one, so the next attempt tries it again; to begin anew, remove {folder}"
        return f"The next attempt goes on from the one before it: {found.folder}"

    def _all(self) -> list[Path]:
        """Of all claims, most steps first; then those that could not be read."""
        return sorted(self.folder.glob("*/checkpoint-*"), key=lambda path: ((path / UNREADABLE).exists(), -_step(path)))

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
        if STATE not in marker["files_bytes"]:
            return f"it has no {STATE}"
        if found := damage(folder, marker["files_bytes"]):
            return found
        if (step := atomic.read_json(folder / STATE)["global_step"]) != _step(folder):
            return f"its {STATE} is of step {step}"
        return untrusted(folder)

    def seal(self, folder: Path, files_bytes: Mapping[str, int] | None = None, patience_s: float = 0.0) -> None:
        """Declare a checkpoint whole, read it back, and only then remove those before it.

        For rank 0, after all ranks have written and synced their parts.

        Parameters
        ----------
        files_bytes
            What all hosts together have written; None where this one sees all of it.
        patience_s
            How late files of other hosts may become visible to this one.

        Raises
        ------
        CheckpointFailed
            When a file is not there, or is not whole; nothing was removed.
        """
        wanted = dict(sorted((sizes(folder) if files_bytes is None else files_bytes).items()))
        for name in [name for name in wanted if name == PICKLED_ARGUMENTS or name.endswith(".py")]:
            (folder / name).unlink(missing_ok=True)  # DeepSpeed adds its scripts to each checkpoint
            del wanted[name]
        deadline = time.monotonic() + patience_s
        while damage(folder, wanted) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        marker = {
            "step": _step(folder), "fingerprint": self.fingerprint, "written": time.time(), "files_bytes": wanted,
        }  # fmt: skip
        atomic.write_json(folder / COMPLETE, marker)
        if problem := self._refusal(folder):
            (folder / COMPLETE).unlink(missing_ok=True)
            raise CheckpointFailed(f"{folder} was written and cannot be read back: {problem}")
        self._sealed.add(folder)
        if self._still_ours():
            half_removed = [path for path in self.own.glob("checkpoint-*") if not (path / COMPLETE).exists()]
            for older in [*self._whole()[self._keep :], *half_removed]:
                _remove(older)

    def _whole(self) -> list[Path]:
        """The whole checkpoints that we could have continued, in the order in which we would.

        Those that this process sealed are not read again: with hundreds of ranks they are thousands of files.
        """
        return [
            folder
            for folder in self._all()
            if (folder in self._sealed and (folder / COMPLETE).exists()) or self._refusal(folder) is None
        ]

    def remove(self) -> None:
        """Remove all checkpoints of the stage, of every claim: its final weights are there and verified (L23)."""
        shutil.rmtree(self.folder, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Force what this host wrote below `folder` to disk."""
    for name in sizes(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """Remove a checkpoint as far as that goes: whoever saves next, or begins, tries again. The new one is whole."""
    try:
        (folder / COMPLETE).unlink(missing_ok=True)  # first: half a folder must not look whole
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("an older checkpoint cannot be removed now: %s", error)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1
