"""What a finished stage made, as one checksum: SHA-256 over paths and checksums of its outputs, in shard order."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

from hpc_rl.run import atomic
from hpc_rl.run.lease import acquire
from hpc_rl.run.manifest import Manifests

FEW = 64
"""Up to so many manifests are read each time; the digest of more is kept in the stage's folder."""
TTL_S, PATIENCE_S = 60.0, 600.0
PAUSE_FIRST_S, PAUSE_MOST_S = 0.2, 10.0
"""Pauses between two looks at whether another task has written the digest down."""


def digest_path(stage_folder: Path) -> Path:
    """Where a stage's digest is kept. The lease lies beside it, away from the ten thousand of the shards."""
    return stage_folder / "digest" / "outputs.sha256"


def digest_of_outputs(manifests: Manifests) -> str:
    """The digest of a stage, hexadecimal.

    A thousand tasks that begin at once do not each read ten thousand manifests: one reads them, under a lease, and
    writes the digest down for the others.
    """
    if len(manifests) <= FEW:
        return _digest(manifests)
    path = digest_path(manifests.folder)
    deadline, pause_s = time.monotonic() + PATIENCE_S, PAUSE_FIRST_S
    while (kept := _read(path)) is None:
        lease = acquire(path.parent, "outputs", TTL_S)
        if lease is None and time.monotonic() < deadline:
            time.sleep(pause_s * random.uniform(0.5, 1.5))  # not all tasks at once
            pause_s = min(2 * pause_s, PAUSE_MOST_S)
            continue
        try:
            if _read(path) is None:
                atomic.create_exclusive(path, f"{_digest(manifests)}\n")
        finally:
            if lease is not None:
                lease.release()
    return kept


def forget_digest(stage_folder: Path) -> None:
    """To be called before a shard that was done once is done again."""
    digest_path(stage_folder).unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _digest(manifests: Manifests) -> str:
    digest = hashlib.sha256()
    for manifest in manifests:
        for output in manifest.outputs:
            digest.update(f"{output.sha256}  {output.path}\n".encode())
    return digest.hexdigest()
