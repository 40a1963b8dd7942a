"""Outputs with a name of their own, which all claims of a shard share: put there at the last moment, then committed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_rl.orchestrate.shard import Shard
from hpc_rl.run import atomic

log = logging.getLogger("hpc_rl")


def commit_placed(
    shard: Shard, written: Mapping[Path, Path], *, made_from: Mapping[str, Any], metrics: Mapping[str, Any]
) -> bool:
    """Rename what was written under `Shard.output` to where people look for it, and commit it there.

    A job that is killed in between has put whole files there which no manifest names; the next one, which makes the
    same ones, replaces them.

    Parameters
    ----------
    written
        Path as written → path to be; their folders are made. A manifest finds them by their new names.
    made_from, metrics
        As for `Shard.commit`.

    Returns
    -------
    bool
        False when another job has taken the shard over; then what was written is removed.
    """
    if not shard.still_ours():
        log.warning("another job has taken this over; this copy is thrown away")
        for path in written:
            path.unlink(missing_ok=True)
        return False
    for folder in {path.parent for path in written.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    placed = [path.rename(final) for path, final in written.items()]
    for folder in {path.parent for path in placed}:
        atomic.fsync_folder(folder)
    return shard.commit(placed, made_from=made_from, metrics=metrics)
