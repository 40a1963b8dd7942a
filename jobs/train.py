"""Job body of every stage that trains: what its recipe says (`training`), on all ranks of the job."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import secrets
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hpc_rl import recipes
from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.orchestrate.spent import CHECKPOINTS, remove_spent
from hpc_rl.run import atomic

if TYPE_CHECKING:
    from hpc_rl.engines.weights import Weights
    from hpc_rl.training.ranks.distributed import World
    from hpc_rl.training.ranks.leaving import Leaving
    from hpc_rl.training.run import Places, Trained, TrainRun
    from hpc_rl.training.task import TrainTask

log = logging.getLogger("hpc_rl")

_LOST_RANK = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|socket closed|store\w* .*closed"
    r"|remote process exited|ncclRemoteError|ncclSystemError|watchdog .*timeout|timed out waiting|recvValue failed",
    re.IGNORECASE,
)
GRACE_MARGIN_S = 5.0
"""A rank that cannot leave ends this long before the entry process would kill it."""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.train --workspace W --round R [--stage NAME]`, once per rank.

    75 when inputs or a service are missing, or when another rank does not come or was lost (its own log says why).
    """
    # DeepSpeed calls collectives by their old names, which torch notes at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    job = open_job("train", argv)
    config = job.config
    task = recipes.load(config.recipe).training(config, job.stage.id)
    from hpc_rl.engines.gpus import check_gpus
    from hpc_rl.training.ranks.distributed import process_group
    from hpc_rl.training.ranks.leaving import Leaving

    check_gpus(config, job.stage.name)
    # without an entry process nobody kills, and the site's delay is as good a limit as any
    grace_s = max(1.0, float(os.environ.get("HPC_RL_GRACE_S", config.cluster.signal_delay_s)) - GRACE_MARGIN_S)
    longest_call_s = max(config.services.of(name).client.deadline_s for name in type(config.services).model_fields)
    with (
        Leaving(grace_s) as leaving,
        _blocked_by_lost_rank(),
        process_group(
            job.folder,
            backend=task.settings.backend,
            interface=config.cluster.network_interface,
            deepspeed=task.settings.deepspeed is not None,
            fsdp=task.settings.fsdp is not None,
            preflight_s=task.settings.preflight_s,
            timeout_s=max(1800.0, config.run.linger_s + 600.0, longest_call_s + 600.0),
        ) as world,
    ):
        for shard, token in _claims(job, world.is_main):
            train(job, task, shard, token, world, leaving)
    return 0


def train(job: Job, task: TrainTask, shard: Shard, token: str, world: World, leaving: Leaving) -> None:
    """Do the training of this stage and, on rank 0, commit it."""
    from hpc_rl.engines.memory import notches_of
    from hpc_rl.engines.weights import weights_of
    from hpc_rl.services.calling import ServiceUnavailable
    from hpc_rl.training import algorithms, memory
    from hpc_rl.training.errors import NothingToLearn
    from hpc_rl.training.exporting.export import remove_leftovers
    from hpc_rl.training.ranks.distributed import broadcast_object, rank_0_alone
    from hpc_rl.training.run import Trained, TrainRun

    _set_up_wandb(job, world.is_main)
    roles = [task.role, *([task.second] if task.second else [])]
    starts = broadcast_object([weights_of(job.ws, r, task.trained_round) for r in roles] if world.is_main else None)
    assert starts is not None
    weights = starts[0]
    places = _places(job, task, shard, token, world.rank)
    with rank_0_alone("leftovers are removed"):
        if world.is_main:
            remove_spent(job.ws, (stage for stage in job.graph.work if stage.round <= job.round))
            for folder in places.models:
                remove_leftovers(folder)
    notches = broadcast_object(notches_of(job.ws, job.round, job.stage.name) if world.is_main else 0)
    run = TrainRun(
        job, memory.lowered_task(task, notches), world, leaving, weights, places, shard.progress, shard.still_ours,
        starts[1] if task.second else None, notches,
    )  # fmt: skip
    try:
        trained = algorithms.load(task.algorithm).train(run)
    except ServiceUnavailable as error:
        log.error("ServiceUnavailable: %s", error)
        raise SystemExit(EXIT_BLOCKED) from error
    except NothingToLearn as nothing:
        if task.nothing_to_learn == "stop":
            raise
        log.warning("nothing to learn in round %d: %s. The weights stay as they were", job.round, nothing)
        second = starts[1].hash if task.second else None
        trained = Trained(weights.hash, {"steps": 0}, second=second, kept=str(nothing))
    with rank_0_alone("the training is committed"):
        if shard.lease is not None:
            _commit(job, task, run, shard, trained, starts)


def _commit(
    job: Job, task: TrainTask, run: TrainRun, shard: Shard, trained: Trained | None, starts: Sequence[Weights]
) -> None:
    """Declare the training done, unless another job has taken it over, and remove what is not needed any more."""
    from hpc_rl.engines.weights import STANDS

    assert shard.lease is not None
    if trained is None or shard.lease.lost:
        log.warning("another job has taken this training over; this copy is thrown away")
        for path in job.folder.glob(f"shard_*.{run.places.token}.*"):
            path.unlink(missing_ok=True)
        if gate.is_complete(job.ws, job.stage):
            return
        raise SystemExit(EXIT_BLOCKED)
    weights = starts[0]
    folders = run.places.models if not trained.kept else []
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    made_from: dict[str, str | int | None] = {
        "weights": weights.hash, "weights_out": trained.weights, "base": weights.base
    }  # fmt: skip
    if trained.kept:
        made_from |= {"nothing_to_learn": trained.kept, STANDS: task.trained_round}
    if task.second is not None:
        second, name = starts[1], task.second.name
        made_from |= {
            f"weights_{name}": second.hash,
            f"weights_out_{name}": trained.second,
            f"base_{name}": second.base,
        }
    done = shard.commit([*trained.outputs, *files], made_from=made_from, metrics=trained.metrics)
    if done:
        _append_predictions(job, trained.outputs)  # first: removing may take minutes, in which a kill would lose them
        run.remove_checkpoints()


def _places(job: Job, task: TrainTask, shard: Shard, token: str, rank: int) -> Places:
    from hpc_rl.training.run import Places

    name = job.stage.name
    return Places(
        checkpoints=job.folder / CHECKPOINTS,
        final=job.ws.checkpoint_dir(task.role.name, job.round),
        tensorboard=job.ws.tb_dir / f"round_{job.round:02d}" / name if job.config.logging.tensorboard else None,
        token=token,
        output=shard.output,
        debug=_debug_file(job, task, rank),
        second=job.ws.checkpoint_dir(task.second.name, job.round) if task.second else None,
    )


def _debug_file(job: Job, task: TrainTask, rank: int) -> Path | None:
    """Where this rank writes raw completions and rewards, in debug mode (L24)."""
    if not job.config.logging.debug:
        return None
    folder = job.ws.log_dir(job.round, job.stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"debug_{task.role.name}_{rank}_{os.environ.get('HPC_RL_JOB_ID') or 'local'}.txt"


def _append_predictions(job: Job, outputs: Sequence[Path]) -> None:
    """What a live training's judge said goes into the run's log too (L22)."""
    from hpc_rl.grading.predictions import append

    if job.config.logging.prediction_log is not None:
        for path in outputs:
            append(job.config.logging.prediction_log, path)


def _claims(job: Job, leader: bool) -> Iterator[tuple[Shard, str]]:
    """The stage's shard on every rank, with the token of rank 0's claim; rank 0's exit is every rank's."""
    from hpc_rl.training.ranks.distributed import broadcast_object

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
    """A rank that lost another one, or did not find it, is not to blame: it exits as blocked. Others' logs say more."""
    from hpc_rl.training.ranks.meeting import MeetingFailed

    try:
        yield
    except MeetingFailed as error:
        log.error("%s", error)
        raise SystemExit(EXIT_BLOCKED) from error
    except RuntimeError as error:
        if not _LOST_RANK.search(str(error)):
            raise
        log.exception("another rank is gone")
        raise SystemExit(EXIT_BLOCKED) from error


def _set_up_wandb(job: Job, main: bool) -> None:
    wandb = job.config.logging.wandb
    if wandb.enabled:
        if importlib.util.find_spec("wandb") is None:
            raise RuntimeError(
                "logging.wandb.enabled is true and wandb is not installed: pip install wandb in the train stage's "
                "environment, or set logging.wandb.enabled: false"
            )
        folder = wandb.dir or job.ws.root / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(WANDB_MODE=wandb.mode, WANDB_PROJECT=wandb.project, WANDB_DIR=str(folder))
        if main:  # the only rank that has a run
            os.environ.update(WANDB_RUN_ID=_wandb_run(job), WANDB_RESUME="allow")


def _wandb_run(job: Job) -> str:
    """W&B's id of this training: one for all attempts. Who removes the stage's folder to train anew gets a new one."""
    file = job.folder / "wandb_run.json"
    if not file.exists():
        atomic.write_json(file, {"id": secrets.token_hex(8)})
    return str(json.loads(file.read_text())["id"])


if __name__ == "__main__":
    sys.exit(main())
