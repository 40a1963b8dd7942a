"""Job body of a service stage: load the listener, serve it while a consumer needs it, then leave.

With `--service speaker` no stage: the speaker after a round's training, served by hand for as long as somebody asks.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rl.cluster.rendezvous import rank_environment
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.job import Job, load, open_job
from hpc_rl.run.seeds import derive

if TYPE_CHECKING:
    from hpc_rl.services.handoff import Address
    from hpc_rl.services.hosting import Hosted

log = logging.getLogger("hpc_rl")

POLL_S = 1.0
HOPELESS_FAILURES = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until all consumers are done or nobody asks any more (0), or until told to leave (143)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument.split("=")[0] == "--service" for argument in arguments):
        return serve_by_hand(arguments)
    return serve_stage(open_job("serve", arguments))


def serve_stage(job: Job) -> int:
    """The listener, as a stage of the run."""
    environ = {**os.environ, **rank_environment(os.environ)}
    if consumers_done(job):
        log.info("nobody needs this service any more")
        return 0
    from hpc_rl.data.lewis import image_root
    from hpc_rl.engines.yes_no import YesNoModel
    from hpc_rl.services import listener
    from hpc_rl.services.batching import Batcher
    from hpc_rl.services.hosting import host
    from hpc_rl.services.images import ImageRoots
    from hpc_rl.services.scorer import Scorer
    from hpc_rl.training.checkpoints import weights_hash

    config = job.config
    assert isinstance(config, LewisConfig)
    options = config.services.listener
    address = address_of(config, environ)
    judge = config.listener
    model = YesNoModel(
        judge.path,
        dtype=judge.dtype,
        attention=judge.attn_implementation,
        min_pixels=judge.min_pixels,
        max_pixels=judge.max_pixels,
    )
    scorer = Scorer(model, ImageRoots([image_root(job.ws, config.data.image_root)]))
    batcher: listener.ListenerBatcher = Batcher(
        scorer,
        batch_size=options.batch_size,
        batch_wait_s=options.batch_wait_ms / 1000,
        max_waiting=options.max_queue_pairs,
        workers=options.inference_concurrency,
    )
    app = listener.create_app(batcher, max_pairs=options.max_queue_pairs, acquire_timeout_s=options.acquire_timeout_s)
    told_to_leave = _leave_on_sigterm()
    about = {"service": "listener", "model": config.listener.path, "stage": str(job.stage.id)}
    hosted = host(
        app,
        batcher,
        service="listener",
        folder=job.ws.service_dir("listener"),
        address=address,
        options=options,
        details=lambda: listener.describe(batcher, scorer, about),
        weights_hash=weights_hash(Path(judge.path)),
        environ=environ,
    )
    try:
        return stay(hosted, options, told_to_leave, done=lambda: consumers_done(job))
    finally:
        hosted.leave(options.drain_s)
        batcher.close()
        scorer.close()


def serve_by_hand(argv: Sequence[str]) -> int:
    """`python -m jobs.serve --workspace W --round R --service speaker`: no stage, nobody in the run waits for it."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.serve", description="Serve the speaker as it is after a round, until nobody asks any more."
    )
    parser.add_argument("--workspace", required=True, type=Path, help="the run's folder, as made by hpc_rl.launch")
    parser.add_argument("--round", required=True, type=int, help="the round whose training made it; 0 is the base")
    parser.add_argument("--service", required=True, choices=["speaker"], help="a listener is served by --stage")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    return serve_speaker(load(arguments.workspace, arguments.round, "evaluate"))


def serve_speaker(job: Job) -> int:
    """The speaker after `job.round`, with the settings of `sample`, greedy unless `evaluate.temperature` says not."""
    train = StageId(job.round, "train")
    if job.round > 0 and not gate.is_complete(job.ws, job.graph[train]):
        sys.exit(f"{train} of {job.ws.root} is not done: there are no weights yet. --round 0 serves the base model")
    from hpc_rl.data.lewis import image_root
    from hpc_rl.engines.base import Sampling
    from hpc_rl.engines.opening import open_engine
    from hpc_rl.recipes.lewis import speaker_weights
    from hpc_rl.services import speaker
    from hpc_rl.services.batching import Batcher
    from hpc_rl.services.hosting import host
    from hpc_rl.services.images import ImageRoots

    config = job.config
    assert isinstance(config, LewisConfig)
    environ = {**os.environ, **rank_environment(os.environ)}
    options = config.services.listener  # the frame's settings: address, limits, waiting
    address = address_of(config, environ)
    weights = speaker_weights(job.ws, config, job.round)
    engine = open_engine(
        config.sample.engine,
        config.speaker,
        config.sample,
        base=weights.base,
        adapter=weights.adapter,
        weights_hash=weights.hash,
    )
    describer = speaker.Describer(
        engine,
        ImageRoots([image_root(job.ws, config.data.image_root)]),
        problem=config.data.speaker_problem,
        sampling=Sampling(config.evaluate.temperature, config.sample.max_tokens),
        seed_of=lambda path: derive(config.run.seed, job.round, "describe", path),
    )
    batcher: speaker.SpeakerBatcher = Batcher(
        describer,
        batch_size=options.batch_size,
        batch_wait_s=options.batch_wait_ms / 1000,
        max_waiting=options.max_queue_pairs,
    )
    told_to_leave = _leave_on_sigterm()
    about = {"service": "speaker", "model": config.speaker.path, "round": job.round, "engine": config.sample.engine}
    hosted = host(
        speaker.create_app(batcher, max_images=options.max_queue_pairs, acquire_timeout_s=options.acquire_timeout_s),
        batcher,
        service="speaker",
        folder=job.ws.service_dir("speaker"),
        address=address,
        options=options,
        details=lambda: speaker.describe(batcher, about),
        weights_hash=weights.hash,
        environ=environ,
    )
    try:
        return stay(hosted, options, told_to_leave, done=lambda: False)
    finally:
        hosted.leave(options.drain_s)
        batcher.close()


def address_of(config: LewisConfig, environ: Mapping[str, str]) -> Address:
    """Where a service of this run binds, and what it publishes."""
    from hpc_rl.services import handoff

    return handoff.choose_address(
        config.services.listener.host,
        config.cluster.network_interface,
        in_allocation=environ["HPC_RL_NODELIST_HEAD"] not in ("", "localhost"),
    )


def stay(
    hosted: Hosted, options: ListenerServiceConfig, told_to_leave: threading.Event, done: Callable[[], bool]
) -> int:
    """Wait until it is time to leave; the exit code, or RuntimeError when the service is of no use any more."""
    while not told_to_leave.wait(POLL_S):
        if done():
            log.info("all that this service serves is done")
            return 0
        if hosted.server.idle_s > options.idle_timeout_s:
            log.info("nobody has asked for %g s", options.idle_timeout_s)
            return 0
        if not hosted.server.alive:
            raise RuntimeError("the HTTP server ended by itself; its reason is in the log above")
        if hosted.batcher.counters.failed_in_a_row >= HOPELESS_FAILURES:
            raise RuntimeError(f"the model failed {HOPELESS_FAILURES} times in a row; see the log above")
    log.info("told to leave")
    return 128 + signal.SIGTERM


def consumers_done(job: Job) -> bool:
    """True when every stage that this service serves is complete."""
    return all(gate.is_complete(job.ws, job.graph[stage]) for stage in job.stage.serves)


def _leave_on_sigterm() -> threading.Event:
    """An event that SIGTERM sets (walltime, preemption). In the debug executor's threads there are no signals."""
    told = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: told.set())
    return told


if __name__ == "__main__":
    sys.exit(main())
