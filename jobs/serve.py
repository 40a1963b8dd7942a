"""Job body of a service stage: load the listener, serve it while a consumer needs it, then leave."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from hpc_rl.cluster.rendezvous import rank_environment
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.job import Job, open_job

log = logging.getLogger("hpc_rl")

POLL_S = 1.0
HOPELESS_FAILURES = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until all consumers are done or nobody asks any more (0), or until told to leave (143)."""
    job = open_job("serve", argv)
    environ = {**os.environ, **rank_environment(os.environ)}
    if consumers_done(job):
        log.info("nobody needs this service any more")
        return 0
    from hpc_rl.data.lewis import image_root
    from hpc_rl.engines.yes_no import YesNoModel
    from hpc_rl.services import handoff, listener
    from hpc_rl.services.batching import Batcher
    from hpc_rl.services.hosting import host
    from hpc_rl.services.images import ImageRoots
    from hpc_rl.services.scorer import Scorer
    from hpc_rl.training.checkpoints import weights_hash

    config = job.config
    assert isinstance(config, LewisConfig)
    options = config.services.listener
    address = handoff.choose_address(
        options.host,
        config.cluster.network_interface,
        in_allocation=environ["HPC_RL_NODELIST_HEAD"] not in ("", "localhost"),
    )
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
        while not told_to_leave.wait(POLL_S):
            if consumers_done(job):
                log.info("all that this service serves is done")
                return 0
            if hosted.server.idle_s > options.idle_timeout_s:
                log.info("nobody has asked for %g s", options.idle_timeout_s)
                return 0
            if not hosted.server.alive:
                raise RuntimeError("the HTTP server ended by itself; its reason is in the log above")
            if batcher.counters.failed_in_a_row >= HOPELESS_FAILURES:
                raise RuntimeError(f"the model failed {HOPELESS_FAILURES} times in a row; see the log above")
        log.info("told to leave")
        return 128 + signal.SIGTERM
    finally:
        hosted.leave(options.drain_s)
        batcher.close()
        scorer.close()


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
