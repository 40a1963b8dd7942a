"""The gate of a job: its inputs must be there before its body starts, with patience for files shown late."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from hpc_rl.orchestrate.graph import Stage, StageId
from hpc_rl.run import atomic, manifest
from hpc_rl.run.presence import file_system_now
from hpc_rl.run.shard_leases import Hearts, leases_of, read_listing
from hpc_rl.run.workspace import Workspace

POLL_S = 0.5
BRIEFLY_S = 2.0


def is_complete(ws: Workspace, stage: Stage) -> bool:
    """True when every shard of a stage has its manifest."""
    return len(manifest.done_shards(ws, stage.round, stage.name)) >= stage.shards


def is_at_work(ws: Workspace, stage: Stage, ttl_s: float) -> bool:
    """True while somebody holds one of a stage's shards. Two listings, and a look at each holder until one lives."""
    folder = leases_of(ws.stage_dir(stage.round, stage.name))
    listing = read_listing(folder)
    done = manifest.done_shards(ws, stage.round, stage.name)
    undone = [claimed for shard, claimed in listing.shards.items() if shard not in done]
    at_work = {claimed.inode for claimed in undone} | {claimed.copy_inode for claimed in undone}
    holders = {listing.holders[inode] for inode in at_work & listing.holders.keys() if inode is not None}
    if not holders:
        return False
    now = file_system_now(folder)
    hearts = Hearts(folder, ttl_s, lambda: now)
    return any(hearts.beats(holder) for holder in holders)


def missing(ws: Workspace, stages: Iterable[Stage]) -> list[StageId]:
    """Those of `stages` that are not complete."""
    return [stage.id for stage in stages if not is_complete(ws, stage)]


def wait_for_inputs(
    ws: Workspace, needs: Iterable[Stage], patience_s: float, sleep: Callable[[float], None] = time.sleep
) -> list[StageId]:
    """Wait until all of `needs` are complete; returns those that are not after waiting.

    A stage whose last attempt is known to have failed is given only a moment: waiting for it would hold GPUs for
    nothing.

    Parameters
    ----------
    patience_s
        How late the file system may show what another node wrote: attribute caches of NFS and Lustre keep an absent
        file absent for up to a minute (nfs(5), `acdirmax`).
    """
    needs = list(needs)
    started = time.monotonic()
    while absent := missing(ws, needs):
        waited_s = time.monotonic() - started
        hopeless = any(_last_attempt_failed(ws, id) for id in absent)
        if waited_s >= (min(BRIEFLY_S, patience_s) if hopeless else patience_s):
            return absent
        for id in absent:  # opening the folder makes NFS clients ask the server again
            _list(ws, id)
        sleep(POLL_S)
    return []


def _list(ws: Workspace, id: StageId) -> list[str]:
    try:
        return os.listdir(ws.attempts_dir(id.round, id.name))
    except FileNotFoundError:
        return []


def _last_attempt_failed(ws: Workspace, id: StageId) -> bool:
    """True when no task of a stage's newest attempt ended as done."""
    folder = ws.attempts_dir(id.round, id.name)
    ends = [folder / name for name in _list(ws, id) if ".end-" in name and not name.startswith(".")]
    if not ends:
        return False
    records = [atomic.read_json(path) for path in ends]
    newest = max(records, key=lambda record: record["ended"])["name"]
    return all(record["outcome"] != "done" for record in records if record["name"] == newest)
