"""What the workspace knows of a round's sampling: manifests, tasks' records and end records, read and put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.graph import Stage
from hpc_rl.orchestrate.reconcile import end_records
from hpc_rl.run import manifest
from hpc_rl.run.manifest import StoredManifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.sampling import lives, summary
from hpc_rl.sampling.published import published
from hpc_rl.sampling.record import read_records


def summarise(ws: Workspace, stage: Stage, ends: Sequence[EndRecord] | None = None) -> summary.Summary | None:
    """A stage's sampling as it stands; None where no task has sampled (yet).

    Manifests are read one after the other: thousands of shards cost time, not memory. `ends`: the stage's end records,
    where the caller has read them.
    """
    records = list(read_records(ws.stage_dir(stage.round, stage.name)))
    if not records:
        return None
    shards = manifest.done_shards(ws, stage.round, stage.name)
    done = published(_manifests(ws, stage, sorted(shards)))
    ends = end_records(ws, stage.id) if ends is None else ends
    return summary.summarise(done, lives.lives(records, ends, done.kept, complete=len(shards) >= stage.shards))


def _manifests(ws: Workspace, stage: Stage, shards: list[int]) -> Iterator[StoredManifest]:
    for shard in shards:
        yield manifest.read(ws, stage.round, stage.name, shard)
