"""One claimed shard: where its outputs go, and how it is declared done."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hpc_rl.run import atomic, manifest
from hpc_rl.run.digest import forget_digest
from hpc_rl.run.manifest import Manifest
from hpc_rl.run.presence import Holder
from hpc_rl.run.shard_leases import shard_lease_path

if TYPE_CHECKING:
    from hpc_rl.orchestrate.claims import Claims
    from hpc_rl.orchestrate.job import Job

log = logging.getLogger("hpc_rl")


@dataclass(frozen=True)
class ShardLease:
    """A generation of a shard's lease that these claims hold, or the copy of one that somebody else holds."""

    claims: Claims
    shard: int
    generation: int
    copy: bool
    path: Path

    @property
    def token(self) -> str:
        """Unique to this claim of this shard; part of the names of what is written under it."""
        return f"{self.claims.token}-{self.generation}{'c' if self.copy else ''}"

    @property
    def lost(self) -> bool:
        """True once somebody else has taken the shard over."""
        return shard_lease_path(self.path.parent, self.shard, self.generation + 1).exists()

    def give_back(self) -> None:
        """Free the shard for the next one that asks, whatever else these claims hold.

        A lease is given back by a next generation whose holder was never there; a copy by removing its name.
        """
        if self.copy:
            self.path.unlink(missing_ok=True)
            return
        nobody = atomic.to_json(vars(Holder.this_process()))
        atomic.create_exclusive(shard_lease_path(self.path.parent, self.shard, self.generation + 1), nobody)


@dataclass(eq=False)
class Shard:
    """One claimed piece of a stage's work. Without a lease (ranks other than 0) it can be worked on, not committed."""

    job: Job
    index: int
    lease: ShardLease | None
    started: float = field(default_factory=time.time)
    committed: bool = False

    @property
    def manifest_path(self) -> Path:
        """Where its manifest lies once it is done."""
        return manifest.manifest_path(self.job.ws, self.job.round, self.job.stage.name, self.index)

    def output(self, name: str) -> Path:
        """A path that no other claim of this shard writes to; its name ends with `name`."""
        token = self.lease.token if self.lease else "follower"
        return self.job.folder / f"shard_{self.index:04d}.{token}.{name}"

    def create(self, name: str) -> BinaryIO:
        """The output `name`, open for writing; to be committed as it is, which saves the server opening it again."""
        return self.output(name).open("w+b")

    def progress(self, done: int, total: int) -> None:
        """Say how far the shard is, for bodies that do one at a time; see `Claims.progress`."""
        if self.lease is not None:
            self.lease.claims.progress(done, total)

    def still_ours(self) -> bool:
        """True while the claim holds and nobody has committed the shard.

        To be asked right before output is put under a name that all claims share: a job that was frozen while another
        one took over must not replace what that one has committed.
        """
        return self.lease is not None and not self.lease.lost and not self.manifest_path.exists()

    def commit(
        self,
        outputs: Sequence[Path | BinaryIO],
        *,
        made_from: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Declare the shard done: outputs are forced to disk and summed up, the manifest is written last.

        Outputs are paths, or files that `create` opened and that are still open. Returns False when another worker was
        faster; then ours is void and its files are removed.
        """
        assert self.lease is not None, "only the holder of the lease commits"
        job, ws = self.job, self.job.ws
        record = Manifest(
            round=job.round,
            stage=job.stage.name,
            shard=self.index,
            outputs=tuple(manifest.describe_output(ws, output) for output in outputs),
            made_from=manifest.to_plain({**job.provenance, **made_from}),
            metrics=manifest.to_plain(dict(metrics or {})),
            attempt=os.environ.get("HPC_RL_ATTEMPT", ""),
            host=socket.gethostname(),
            job_id=os.environ.get("HPC_RL_JOB_ID", ""),
            started=self.started,
            ended=time.time(),
        )
        if self.lease.generation > 1:
            forget_digest(job.folder)
        self.committed = manifest.write(ws, record, self.lease.claims.descriptor)
        self.lease.claims.settled(self)
        if not self.committed:
            log.warning(
                "shard %d of %s was done by somebody else meanwhile; this copy is thrown away", self.index, job.stage.id
            )
            for output in record.outputs:
                if self.lease.token in output.path:
                    ws.resolve(output.path).unlink(missing_ok=True)
        return self.committed

    def abandon(self) -> None:
        """Give the claim back, so that others may do the shard. Does nothing once it is done, or the second time."""
        if self.lease is not None:
            self.lease.claims.give_back(self)
