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
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.cluster.failures import EXIT_BLOCKED, EXIT_OUT_OF_TIME
from hpc_rl.cluster.walltime import Deadline
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.claims import Claims
from hpc_rl.orchestrate.graph import Graph, Stage, StageId
from hpc_rl.orchestrate.shard import Shard
from hpc_rl.run import atomic, manifest
from hpc_rl.run.closed import keep_closed
from hpc_rl.run.digest import digest_of_outputs
from hpc_rl.run.manifest import Manifests, StoredManifest
from hpc_rl.run.workspace import Workspace

__all__ = ["Job", "Shard", "load", "open_job"]

log = logging.getLogger("hpc_rl")


@dataclass(frozen=True)
class Job:
    """A job body's view of the run."""

    ws: Workspace
    config: Config
    graph: Graph
    stage: Stage
    done: frozenset[int] | None = None
    """Shards that were done when the job began; None when nobody has looked."""

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

    def input(self, round: int, stage: str, shard: int) -> StoredManifest:
        """The manifest of one shard of a finished stage."""
        return manifest.read(self.ws, round, stage, shard)

    def inputs(self, round: int, stage: str) -> Manifests:
        """All manifests of a finished stage, in shard order; each is read when it is its turn."""
        return Manifests(self.ws, round, stage, self.graph[StageId(round, stage)].shards)

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """What every manifest says about where its outputs came from; past the gate the inputs stay the same.

        An input stage is one digest over all of its outputs, so that the manifests of two stages of 10 000 shards do
        not hold each other's 10 000 checksums.
        """
        return {
            "config": configs.config_hash(self.config),
            "code": os.environ.get("HPC_RL_CODE", ""),
            "run_seed": self.config.run.seed,
            "inputs": {
                f"round_{need.round:02d}/{need.name}": digest_of_outputs(self.inputs(need.round, need.name))
                for need in self.stage.needs
            },
        }

    def claims(self) -> Claims:
        """The claims of this task; a context manager, which gives back what is not done."""
        return Claims(self, self.done)

    def shards(self, leader: bool = True) -> Iterator[Shard]:
        """Claim one shard after the other until the stage is done.

        When all that is left is in other hands, this waits for them for `run.linger_s`, ready to take a shard over from
        one that dies; then it leaves, so that no GPU is held for nothing. It leaves as well (SystemExit, 124) when
        another shard as slow as the slowest so far would not be done before the job's time limit.

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
        deadline = Deadline.of(os.environ)
        slowest_s = 0.0
        waiting_since: float | None = None
        with self.claims() as claims:
            while True:
                fits = not slowest_s or slowest_s <= deadline.left_s()
                shard = claims.next() if fits else None
                if shard is not None:
                    waiting_since, began = None, time.monotonic()
                    yield shard
                    shard.abandon()
                    slowest_s = max(slowest_s, time.monotonic() - began)
                    continue
                if claims.all_done():
                    return
                if not fits:
                    log.info("no further shard is claimed: one takes up to %.0f s, and this job must leave", slowest_s)
                    raise SystemExit(EXIT_OUT_OF_TIME)
                waiting_since = time.monotonic() if waiting_since is None else waiting_since
                if time.monotonic() - waiting_since > self.config.run.linger_s:
                    log.warning("leaving %s: %d shards are in other hands", self.stage.id, claims.left())
                    if self.stage.shards == 1:
                        raise SystemExit(EXIT_BLOCKED)
                    return
                time.sleep(claims.pause_s)


def parse_arguments(default_stage: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that every job body takes; without a default the stage must be named."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs" if default_stage is None else None,
        description="Does one round's work of a stage in a workspace.",
    )
    parser.add_argument("--workspace", required=True, type=Path, help="the run's folder, as made by hpc_rl.launch")
    parser.add_argument("--round", required=True, type=int, help="the round to work for, 0 is the preparation")
    default = "" if default_stage is None else " (default: %(default)s)"
    parser.add_argument(
        "--stage", default=default_stage, required=default_stage is None, help=f"the stage's name in the round{default}"
    )
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
    keep_closed()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)  # so that leases are given back on the way out
    job = load(arguments.workspace, arguments.round, arguments.stage)
    if job.stage.has_work:
        done = manifest.done_shards(job.ws, job.round, job.stage.name)
        job = replace(job, done=done)
        if len(done) >= job.stage.shards:
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
    if not job.folder.is_dir():
        job.folder.mkdir(parents=True, exist_ok=True)
    return job


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
