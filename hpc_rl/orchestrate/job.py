"""What all job bodies share: arguments, the gate, the shards they claim, and manifests for what they made.

job = open_job("sample", argv)
for shard in job.shards():
    path = shard.output("samples.parquet")
    ...
    shard.commit([path], made_from={"weights": hash}, metrics={"tokens": n})
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.graph import Graph, Stage, StageId
from hpc_rl.run import atomic, manifest
from hpc_rl.run.lease import Lease, acquire
from hpc_rl.run.manifest import Manifest, StoredManifest
from hpc_rl.run.workspace import Workspace

log = logging.getLogger("hpc_rl")

POLL_FIRST_S, POLL_MOST_S = 0.1, 2.0
"""Pauses between two looks at shards in other hands, growing from the first to the most."""


@dataclass
class Shard:
    """One claimed piece of a stage's work. Without a lease (ranks other than 0) it can be worked on, not committed."""

    job: Job
    index: int
    lease: Lease | None
    started: float = field(default_factory=time.time)
    committed: bool = False
    _reported: float = 0.0

    def output(self, name: str) -> Path:
        """A path that no other claim of this shard writes to; its name ends with `name`."""
        token = self.lease.token if self.lease else "follower"
        return self.job.folder / f"shard_{self.index:04d}.{token}.{name}"

    def progress(self, done: int, total: int) -> None:
        """Say how far the shard is; for `status` only, at most once a second."""
        if self.lease is not None and time.monotonic() - self._reported >= 1.0:
            self._reported = time.monotonic()
            path = self.job.folder / f"shard_{self.index:04d}.progress"
            temporary = path.with_name(f".tmp-{path.name}-{self.lease.token}")
            temporary.write_text(f'{{"done": {done}, "total": {total}}}\n')
            temporary.replace(path)

    def still_ours(self) -> bool:
        """True while the claim holds and nobody has committed the shard.

        To be asked right before output is put under a name that all claims share: a job that was frozen while another
        one took over must not replace what that one has committed.
        """
        path = manifest.manifest_path(self.job.ws, self.job.round, self.job.stage.name, self.index)
        return self.lease is not None and not self.lease.lost and not path.exists()

    def commit(
        self, outputs: Sequence[Path], *, made_from: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
    ) -> bool:
        """Declare the shard done: outputs are forced to disk and summed up, the manifest is written last.

        Returns False when another worker was faster; then ours is void and its files are removed.
        """
        assert self.lease is not None, "only the holder of the lease commits"
        job, ws = self.job, self.job.ws
        record = Manifest(
            round=job.round,
            stage=job.stage.name,
            shard=self.index,
            outputs=tuple(manifest.describe_output(ws, path) for path in outputs),
            made_from=manifest.to_plain({**job.provenance, **made_from}),
            metrics=manifest.to_plain(dict(metrics or {})),
            attempt=os.environ.get("HPC_RL_ATTEMPT", ""),
            host=socket.gethostname(),
            job_id=os.environ.get("HPC_RL_JOB_ID", ""),
            started=self.started,
            ended=time.time(),
        )
        self.committed = manifest.write(ws, record)
        (job.folder / f"shard_{self.index:04d}.progress").unlink(missing_ok=True)
        if not self.committed:
            log.warning(
                "shard %d of %s was done by somebody else meanwhile; this copy is thrown away", self.index, job.stage.id
            )
            for path in outputs:
                if self.lease.token in path.name:
                    path.unlink(missing_ok=True)
        return self.committed


@dataclass(frozen=True)
class Job:
    """A job body's view of the run."""

    ws: Workspace
    config: Config
    graph: Graph
    stage: Stage

    @property
    def round(self) -> int:
        """The round that this job works for."""
        return self.stage.round

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.ws.stage_dir(self.round, self.stage.name)

    @property
    def rank(self) -> int:
        """Rank of this process in its job."""
        return int(os.environ.get("RANK", "0"))

    def inputs(self, round: int, stage: str) -> list[StoredManifest]:
        """All manifests of a finished stage, in shard order."""
        declared = self.graph[StageId(round, stage)]
        return [manifest.read(self.ws, round, stage, shard) for shard in range(declared.shards)]

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """What every manifest says about where its outputs came from; past the gate the inputs stay the same."""
        inputs = {
            f"round_{need.round:02d}/{need.name}": [
                output.sha256 for m in self.inputs(need.round, need.name) for output in m.outputs
            ]
            for need in self.stage.needs
        }
        return {
            "config": configs.config_hash(self.config),
            "code": os.environ.get("HPC_RL_CODE", ""),
            "run_seed": self.config.run.seed,
            "inputs": inputs,
        }

    def shards(self, leader: bool = True) -> Iterator[Shard]:
        """Claim one shard after the other until the stage is done.

        When all that is left is in other hands, this waits for them for `run.linger_s`, ready to take a shard over from
        one that dies; then it leaves, so that no GPU is held for nothing.

        Parameters
        ----------
        leader
            False for the ranks of a multi-node job that only follow: they get each undone shard in order, without a
            claim.
        """
        if not leader:
            assert self.stage.shards == 1, "followers cannot know which of several shards the leader claims"
            for index in sorted(
                set(range(self.stage.shards)) - manifest.done_shards(self.ws, self.round, self.stage.name)
            ):
                yield Shard(self, index, None)
            return
        ttl_s = self.config.run.lease_ttl_s
        waiting_since: float | None = None
        pause_s = POLL_FIRST_S
        offset = int.from_bytes(os.urandom(2), "big")
        while True:
            left = sorted(set(range(self.stage.shards)) - manifest.done_shards(self.ws, self.round, self.stage.name))
            if not left:
                return
            claim = self._claim(left, offset, ttl_s)
            if claim is None:
                waiting_since = time.monotonic() if waiting_since is None else waiting_since
                if time.monotonic() - waiting_since > self.config.run.linger_s:
                    log.warning("leaving %s: %d shards are in other hands", self.stage.id, len(left))
                    if self.stage.shards == 1:
                        raise SystemExit(EXIT_BLOCKED)
                    return
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, POLL_MOST_S)
                continue
            waiting_since, pause_s = None, POLL_FIRST_S
            try:
                yield claim
            finally:
                assert claim.lease is not None
                claim.lease.release()

    def _claim(self, left: Sequence[int], offset: int, ttl_s: float) -> Shard | None:
        """The first shard of `left`, beginning somewhere of our own, that can be claimed."""
        start = offset % len(left)
        for index in (*left[start:], *left[:start]):
            lease = acquire(self.folder, f"shard_{index:04d}", ttl_s)
            if lease is None:
                continue
            if manifest.manifest_path(self.ws, self.round, self.stage.name, index).exists():
                lease.release()  # it was finished between our listing and our claim
                continue
            return Shard(self, index, lease)
        return None


def parse_arguments(default_stage: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that every job body takes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{default_stage}",
        description=f"Job body of the stage {default_stage!r}: does one round's work in a workspace.",
    )
    parser.add_argument("--workspace", required=True, type=Path, help="the run's folder, as made by hpc_rl.launch")
    parser.add_argument("--round", required=True, type=int, help="the round to work for, 0 is the preparation")
    parser.add_argument("--stage", default=default_stage, help="the stage's name in the round (default: %(default)s)")
    return parser.parse_args(argv)


def load(workspace: Path, round: int, stage: str) -> Job:
    """The job of a stage, without passing the gate.

    Raises
    ------
    SystemExit
        When the workspace holds no run, or the run has no such stage; the message names what there is.
    """
    ws = Workspace(workspace)
    try:
        config = configs.from_json(atomic.read_json(ws.config_path))
    except FileNotFoundError:
        sys.exit(
            f"{ws.root} holds no run (no {ws.config_path.name}). "
            f"Make one with: python -m hpc_rl.launch CONFIG --workspace {ws.root} --init"
        )
    graph = recipes.graph_of(config)
    id = StageId(round, stage)
    if id not in graph.by_id:
        known = ", ".join(s.name for s in graph.of_round(round)) or f"no stages; rounds are 0 to {graph.rounds}"
        sys.exit(f"there is no stage {stage!r} in round {round} of {ws.root}. Round {round} has: {known}")
    return Job(ws, config, graph, graph[id])


def open_job(default_stage: str, argv: Sequence[str] | None = None) -> Job:
    """Parse arguments, load the run, and pass the gate.

    Leaves the process with code 0 when the stage is done already, and with `EXIT_BLOCKED` when its inputs do not come.
    """
    arguments = parse_arguments(default_stage, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)  # so that leases are given back on the way out
    job = load(arguments.workspace, arguments.round, arguments.stage)
    if job.stage.has_work and gate.is_complete(job.ws, job.stage):
        log.info("%s is done already", job.stage.id)
        raise SystemExit(0)
    patience_s = job.config.run.gate_patience_s
    absent = gate.wait_for_inputs(
        job.ws,
        [job.graph[need] for need in job.stage.needs],
        job.config.cluster.file_system_lag_s if patience_s is None else patience_s,
    )
    if absent:
        log.error("%s is blocked: %s not there", job.stage.id, ", ".join(f"{id} is" for id in absent))
        raise SystemExit(EXIT_BLOCKED)
    job.folder.mkdir(parents=True, exist_ok=True)
    return job


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
