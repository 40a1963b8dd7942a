"""What engines compile, kept from round to round: slots, each used by one process at a time.

    slot = claim(folder, what_compiles(), own_number())       # None where all that were tried are taken
    …                                                         # start the engine, given slot.stable_path(model)
    slot.settle()

Tasks that share one cache corrupt it, so each has a slot of its own, held by a lease; which, begins with its number in
the array, so that it mostly finds its own of the round before. A slot whose last holder did not get as far as `settle`
is emptied: nobody knows what a killed process left half written.

The caches are code that runs when it is read. They lie in a folder that only this user may enter, in one to which only
this user may write, both made so and checked. The workspace around them is trusted: its config names the programs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpc_rl.run import atomic
from hpc_rl.run.lease import Lease, acquire
from hpc_rl.run.private import close_to_others, make_private

log = logging.getLogger(__name__)

SLOTS = 64
"""Of one kind. Tasks beyond that share numbers, and those that come late compile anew."""
TRIES = 4
"""Slots that a process looks at before it does without: a look costs a few questions to the file system."""
MOST_BYTES = 4 * 2**30
"""A slot that holds more is emptied before it is used again."""
UNUSED_FOR_S = 30 * 86_400
"""Caches of another kind (another version, another GPU) that nobody used for so long are removed."""
TTL_S = 120.0
UNSETTLED = "unsettled"


class SlotLost(RuntimeError):
    """Another process took the slot over while the model was loaded from it, and what was loaded is not known."""


@dataclass
class Slot:
    """A slot that this process holds.

    Attributes
    ----------
    folder
        What is compiled goes here.
    """

    folder: Path
    _lease: Lease
    _model: str = ""

    @property
    def _link(self) -> Path:
        return self.folder / "model"

    def stable_path(self, model: str) -> str:
        """A path that leads to `model` and is the same in every round: what vLLM compiles goes by the model's path.

        `model` itself where another process has the slot by now.
        """
        if self._lost():
            return model
        self._model = str(Path(model).absolute())
        temporary = self._link.with_name("model.new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self._model)
        temporary.replace(self._link)
        return str(self._link)

    def settle(self) -> None:
        """The engine has started: what it has compiled for that is whole, and its weights are those of `stable_path`.

        Raises
        ------
        SlotLost
            When the path leads to another model by now. A process that stood still for long does not know that it lost
            its slot before it looks.
        """
        try:
            found = str(self._link.readlink()) if self._model else ""
        except FileNotFoundError:  # emptied, and not yet linked by its next holder
            found = self._model
        if found != self._model:
            raise SlotLost(
                f"{self._link} led to {self._model} when the engine was started and leads to {found} now: this process "
                f"stood still for more than {TTL_S:.0f} s, and another one took its slot. Which of the two was loaded "
                "is not known: start again"
            )
        if not self._lost():
            (self.folder / UNSETTLED).unlink(missing_ok=True)

    def _lost(self) -> bool:
        lost = self._lease.lost
        if lost:
            log.warning("this process stood still for long: %s may be another's by now", self.folder)
        return lost

    def close(self) -> None:
        """Give it back."""
        self._lease.release()

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def what_compiles() -> dict[str, str]:
    """Everything that makes compiled code unfit for another process: versions, and the hardware it is for."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {_cpu_model()}"
    return {
        **{name: _version(name) for name in ("vllm", "torch", "triton")},
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": gpu,
    }


def claim(folder: Path, compiler: Mapping[str, str], number: int) -> Slot | None:
    """A slot among those that `compiler` may use, or None when those that were tried are taken.

    Parameters
    ----------
    folder
        `Workspace.compile_cache`; made if it is not there. Others lose the right to write to the folder around it.
    compiler
        See `what_compiles`.
    number
        Of this process among those that run at the same time: where to begin.

    Raises
    ------
    NotPrivate
        When others may write to the folder, or own it or the one around it. `keep_compiled: false` does without.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    close_to_others(folder.parent)
    make_private(folder)
    kind = folder / hashlib.sha256(json.dumps(dict(compiler), sort_keys=True).encode()).hexdigest()[:16]
    if not kind.is_dir():
        kind.mkdir(exist_ok=True)
        atomic.write_json(kind / "compiler.json", dict(compiler))  # for people
        _remove_old(folder, keep=kind)
    os.utime(kind)
    for place in range(TRIES):
        name = f"slot_{(number + place) % SLOTS:02d}"
        lease = acquire(kind / "leases", name, TTL_S)
        if lease is not None:
            return _prepare(Slot(kind / name, lease))
    log.info("all slots that were tried in %s are taken: what this process compiles is not kept", kind)
    return None


def own_number(workers: int = 1) -> int:
    """A number that no other process of this array has at the same time: the task's, or the pool worker's in it."""
    task, worker = (int(os.environ.get(name) or 0) for name in ("SLURM_ARRAY_TASK_ID", "HPC_RL_WORKER"))
    return task * workers + worker


def _prepare(slot: Slot) -> Slot:
    unsettled = slot.folder / UNSETTLED
    if unsettled.exists():
        _empty(slot.folder, "the process before did not get ready with it")
    elif (size := _bytes_below(slot.folder)) > MOST_BYTES:
        _empty(slot.folder, f"it holds {size / 2**30:.1f} GiB")
    slot.folder.mkdir(exist_ok=True)
    unsettled.touch()
    return slot


def _empty(folder: Path, why: str) -> None:
    """Remove a slot's content. What a process elsewhere still has open may stay for a while, under another name."""
    log.info("emptying %s: %s", folder, why)
    for left in folder.parent.glob(f".going-{folder.name}-*"):  # by a process that was killed at it
        shutil.rmtree(left, ignore_errors=True)
    going = folder.with_name(f".going-{folder.name}-{secrets.token_hex(4)}")
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _remove_old(folder: Path, keep: Path) -> None:
    for kind in folder.iterdir():
        try:
            unused_s = time.time() - kind.stat().st_mtime
        except FileNotFoundError:
            continue  # another task removes it at the same moment
        if kind != keep and unused_s > UNUSED_FOR_S:
            log.info("removing %s: nobody used it for %d days", kind, UNUSED_FOR_S // 86_400)
            shutil.rmtree(kind, ignore_errors=True)


def _bytes_below(folder: Path) -> int:
    return sum((Path(at) / name).lstat().st_size for at, _, names in os.walk(folder) for name in names)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    """The processor's name (proc(5), cpuinfo): what is compiled for one may not run on another."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
