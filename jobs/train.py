"""Job body of the train stage: a GRPO update of the speaker on the round's graded samples, on all ranks of the job."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.job import Job, Shard, open_job

log = logging.getLogger("hpc_rl")

_LOST_RANK = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|socket closed|store\w* .*closed"
    r"|remote process exited|ncclRemoteError|ncclSystemError|watchdog .*timeout|timed out waiting|recvValue failed",
    re.IGNORECASE,
)
GRACE_MARGIN_S = 5.0
"""A rank that cannot leave ends this long before the entry process would kill it."""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.train --workspace W --round R`, once per rank.

    75 when inputs or a service are missing, or when another rank was lost (its own log says why).
    """
    # DeepSpeed calls collectives by their old names, which torch notes at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    job = open_job("train", argv)
    config = job.config
    assert isinstance(config, LewisConfig)
    from hpc_rl.engines.gpus import check_gpus
    from hpc_rl.training.distributed import process_group
    from hpc_rl.training.leaving import Leaving

    check_gpus(config, job.stage.name)
    client = config.services.listener.client
    # without an entry process nobody kills, and the site's delay is as good a limit as any
    grace_s = max(1.0, float(os.environ.get("HPC_RL_GRACE_S", config.cluster.signal_delay_s)) - GRACE_MARGIN_S)
    with (
        Leaving(grace_s) as leaving,
        _blocked_by_lost_rank(),
        process_group(
            job.folder,
            backend=config.train.backend,
            interface=config.cluster.network_interface,
            deepspeed=config.train.deepspeed is not None,
            timeout_s=max(1800.0, config.run.linger_s + 600.0, client.deadline_s + 600.0),
        ) as world,
    ):
        for shard, token in _claims(job, world.is_main):
            train(job, config, shard, token, world, leaving)
    return 0


def train(job: Job, config: LewisConfig, shard: Shard, token: str, world: Any, leaving: Any) -> None:
    """Train this round's speaker and, on rank 0, commit it."""
    from hpc_rl.data.lewis import image_root, read_rows
    from hpc_rl.engines.weights import speaker_weights
    from hpc_rl.grading.predictions import append
    from hpc_rl.sampling.lewis import ROLES
    from hpc_rl.training import store, stored
    from hpc_rl.training.distributed import broadcast_object
    from hpc_rl.training.one_round import Places, RoundTraining, Start

    _set_up_wandb(job, config)
    weights = broadcast_object(speaker_weights(job.ws, config, job.round - 1) if world.is_main else None)
    assert weights is not None
    (dataset,) = job.inputs(0, "dataset")
    rows = read_rows(dataset.path("train.parquet"))
    places_of_rows = {id: place for place, id in enumerate(rows.ids)}
    root = image_root(job.ws, config.data.image_root)
    final = job.ws.checkpoint_dir("speaker", job.round)
    places = Places(
        checkpoints=job.folder / "checkpoints",
        final=final,
        tensorboard=job.ws.tb_dir / f"round_{job.round:02d}" / "train" if config.logging.tensorboard else None,
        token=token,
    )
    start = Start(weights.base, weights.adapter, weights.hash, lambda id: rows[places_of_rows[id]], root)
    training = RoundTraining(config, job.round, world, leaving, start, places, shard.progress, shard.still_ours)
    outputs: list[Path] = []
    if config.train.rollouts == "live":
        predictions = shard.output("predictions.jsonl")
        trained = _train_live(job, config, training, rows, predictions)
        outputs.append(predictions)
    else:
        sample = config.sample
        groups = sample.prompts_per_round * len(ROLES)
        trained = stored.train(training, store.read(graded_files(job), sample.samples_per_prompt, groups, world.rank))
    if shard.lease is None:
        return
    if trained is None or shard.lease.lost:
        log.warning("another job has taken this training over; this copy is thrown away")
        for path in outputs:
            path.unlink(missing_ok=True)
        if gate.is_complete(job.ws, job.stage):
            return
        raise SystemExit(EXIT_BLOCKED)
    done = shard.commit(
        [*outputs, *sorted(path for path in final.iterdir() if path.is_file())],
        made_from={"weights": weights.hash, "weights_out": trained.weights, "base": weights.base},
        metrics=trained.metrics,
    )
    if done:
        training.remove_checkpoints()
        if outputs and config.logging.prediction_log is not None:
            append(config.logging.prediction_log, outputs[0])


def graded_files(job: Job) -> Iterator[Path]:
    """The round's graded samples, shard by shard. A generator: only the rank of a node that goes through it reads."""
    for manifest in job.inputs(job.round, "grade"):
        yield manifest.path("graded.parquet")


def _train_live(job: Job, config: LewisConfig, training: Any, rows: Any, predictions: Path) -> Any:
    """Sample, ask and train; SystemExit(75) when no listener answers."""
    from hpc_rl.data.lewis import rows_of_round
    from hpc_rl.services.calling import ServiceUnavailable
    from hpc_rl.services.client import ListenerClient
    from hpc_rl.training import live

    games = rows_of_round(rows, job.round, prompts_per_round=config.sample.prompts_per_round, seed=config.run.seed)
    with ExitStack() as stack:
        listener = stack.enter_context(ListenerClient(job.ws, config)) if training.world.is_main else None
        try:
            return live.train(training, games, listener, predictions, _debug_file(job, config, training.world.rank))
        except ServiceUnavailable as error:
            log.error("ServiceUnavailable: %s", error)
            raise SystemExit(EXIT_BLOCKED) from error


def _debug_file(job: Job, config: LewisConfig, rank: int) -> Path | None:
    """Where this rank writes raw completions and rewards, in debug mode (L24)."""
    if not config.logging.debug:
        return None
    folder = job.ws.log_dir(job.round, job.stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"debug_speaker_{rank}_{os.environ.get('HPC_RL_JOB_ID') or 'local'}.txt"


def _claims(job: Job, leader: bool) -> Iterator[tuple[Shard, str]]:
    """The stage's shard on every rank, with the token of rank 0's claim; rank 0's exit is every rank's."""
    from hpc_rl.training.distributed import broadcast_object

    with closing(cast(Generator[Shard, None, None], job.shards(leader=leader))) as shards:
        while True:
            shard, said = None, None
            if leader:
                try:
                    shard = next(shards, None)
                    said = ("work", shard.lease.token) if shard is not None and shard.lease else ("done", "")
                except SystemExit as leave:
                    said = ("exit", str(leave.code))
            kind, detail = broadcast_object(said) or ("done", "")
            if kind == "exit":
                raise SystemExit(int(detail))
            if kind == "done":
                return
            if not leader:
                shard = next(shards)
            assert shard is not None
            yield shard, detail


@contextmanager
def _blocked_by_lost_rank() -> Iterator[None]:
    """A rank that lost another one is not to blame: it exits as blocked. The lost rank's own end says what happened."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST_RANK.search(str(error)):
            raise
        log.exception("another rank is gone")
        raise SystemExit(EXIT_BLOCKED) from error


def _set_up_wandb(job: Job, config: LewisConfig) -> None:
    wandb = config.logging.wandb
    if wandb.enabled:
        if importlib.util.find_spec("wandb") is None:
            raise RuntimeError(
                "logging.wandb.enabled is true and wandb is not installed: pip install wandb in the train stage's "
                "environment, or set logging.wandb.enabled: false"
            )
        folder = wandb.dir or job.ws.root / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(WANDB_MODE=wandb.mode, WANDB_PROJECT=wandb.project, WANDB_DIR=str(folder))


if __name__ == "__main__":
    sys.exit(main())
