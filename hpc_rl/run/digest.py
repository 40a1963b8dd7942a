"""What a finished stage made, as one checksum: SHA-256 over paths and checksums of its outputs, in shard order."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hpc_rl.run import atomic
from hpc_rl.run.lease import acquire_patiently
from hpc_rl.run.manifest import Manifests
from hpc_rl.run.shard_leases import leases_of

FEW = 64
"""Up to so many manifests are read each time; the digest of more is kept in the stage's folder."""
TTL_S, PATIENCE_S = 60.0, 600.0


def digest_path(stage_folder: Path) -> Path:
    """Where a stage's digest is kept."""
    return stage_folder / "outputs.sha256"


def digest_of_outputs(manifests: Manifests) -> str:
    """The digest of a stage, hexadecimal.

    A thousand tasks that begin at once do not each read ten thousand manifests: one reads them, under a lease, and
    writes the digest down for the others.
    """
    if len(manifests) <= FEW:
        return _digest(manifests)
    path = digest_path(manifests.folder)
    kept = _read(path)
    if kept is None:
        lease = acquire_patiently(leases_of(manifests.folder), "outputs", TTL_S, PATIENCE_S)
        try:
            kept = _read(path)
            if kept is None:
                kept = _digest(manifests)
                atomic.create_exclusive(path, f"{kept}\n")
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
