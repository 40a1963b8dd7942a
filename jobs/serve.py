"""Job body of a service: load its model, serve it while a consumer needs it, then leave.

As a stage (`--stage grade.listener`) it serves other stages of the run and leaves when they are done, or when none of
them has come for long. By hand (`--service speaker`) no stage waits for it: it leaves when nobody has asked for long.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rl.cluster.rendezvous import rank_environment
from hpc_rl.config.schema import Config
from hpc_rl.config.services import ServiceConfig
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.graph import ADVANCE
from hpc_rl.orchestrate.job import Job, load, open_job

if TYPE_CHECKING:
    from hpc_rl.services.address import Address
    from hpc_rl.services.hosting import Hosted

log = logging.getLogger("hpc_rl")

SERVICES: Mapping[str, str] = {
    "listener": "hpc_rl.services.listener",
    "speaker": "hpc_rl.services.speaker",
    "verifier": "hpc_rl.services.verifier",
    "reward_model": "hpc_rl.services.reward_model",
    "teacher": "hpc_rl.services.teacher",
    "enhancer": "hpc_rl.services.enhancer",
}
"""Service → the module that opens it."""

POLL_S = 1.0
HOPELESS_FAILURES = 5
TOLD_TO_LEAVE = 128 + signal.SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until all consumers are done or nobody asks any more (0), or until told to leave (143)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument.split("=")[0] in ("--service", "-h", "--help") for argument in arguments):
        return serve_by_hand(arguments)
    job = open_job("serve", arguments)
    if consumers_done(job):
        log.info("nobody needs this service any more")
        return 0
    from hpc_rl.engines.gpus import check_gpus

    check_gpus(job.config, job.stage.name)
    name = job.stage.name.rpartition(".")[2]
    return serve(job, name, done=lambda: consumers_done(job), at_work=lambda: consumers_at_work(job))


def serve_by_hand(argv: Sequence[str]) -> int:
    """`python -m jobs.serve --workspace W --round R --service speaker`: no stage, nobody in the run waits for it."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.serve",
        description="Serve a model of a run over HTTP, until nobody asks any more.",
        epilog="Stages of a run are served by --stage STAGE (grade.listener) instead of --service.",
    )
    parser.add_argument("--workspace", required=True, type=Path, help="the run's folder, as made by hpc_rl.launch")
    parser.add_argument("--round", required=True, type=int, help="the round after which to serve it; 0: untrained")
    parser.add_argument("--service", required=True, choices=list(SERVICES), help="what to serve")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    return serve(load(arguments.workspace, arguments.round, ADVANCE), arguments.service)


def never() -> bool:
    """What a service that no stage waits for sees of its consumers."""
    return False


def serve(job: Job, name: str, done: Callable[[], bool] = never, at_work: Callable[[], bool] = never) -> int:
    """Open the service `name`, host it, and stay until it is time to leave; see `stay`."""
    from hpc_rl.services.frame import CannotServe
    from hpc_rl.services.hosting import host

    environ = {**os.environ, **rank_environment(os.environ)}
    options = job.config.services.of(name)
    # in one job with its consumer it would free nothing
    idle_timeout_s = math.inf if is_companion(job, environ) else options.idle_timeout_s
    address = address_of(job.config, options, environ)  # before minutes go into loading a model
    _on_sigterm(lambda: sys.exit(TOLD_TO_LEAVE))  # while nobody is served yet
    try:
        service = importlib.import_module(SERVICES[name]).open_service(job.ws, job.config, job.round, options)
    except CannotServe as error:
        sys.exit(str(error))
    told_to_leave = threading.Event()
    _on_sigterm(told_to_leave.set)
    hosted = host(
        service,
        folder=job.ws.service_dir(name),
        address=address,
        options=options,
        environ=environ,
        lag_s=job.config.cluster.file_system_lag_s,
        tensorboard=job.ws.tb_dir / "services" / name if job.config.logging.tensorboard else None,
    )
    try:
        return stay(hosted, idle_timeout_s, told_to_leave, done, at_work)
    finally:
        hosted.leave(options.drain_s)


def is_companion(job: Job, environ: Mapping[str, str]) -> bool:
    """True in one job with its consumer: on Slurm the job knows (sbatch(1), SLURM_HET_SIZE), elsewhere the config."""
    return "SLURM_HET_SIZE" in environ if "SLURM_JOB_ID" in environ else job.stage.id in job.graph.companions


def address_of(config: Config, options: ServiceConfig, environ: Mapping[str, str]) -> Address:
    """Where a service of this run binds, and what it publishes."""
    from hpc_rl.services.address import choose_address

    return choose_address(
        options.host,
        config.cluster.network_interface,
        in_allocation=environ["HPC_RL_NODELIST_HEAD"] not in ("", "localhost"),
    )


def stay(
    hosted: Hosted,
    idle_timeout_s: float,
    told_to_leave: threading.Event,
    done: Callable[[], bool],
    at_work: Callable[[], bool],
) -> int:
    """Wait until it is time to leave; the exit code, or RuntimeError when the service is of no use any more.

    It leaves when it is told to, when those it serves are `done()`, and when nobody has asked for `idle_timeout_s`
    while none of them was `at_work()`: a trainer between two rollouts asks nothing and needs it all the same.
    """
    last_at_work = -math.inf
    while not told_to_leave.wait(POLL_S):
        try:
            if done():
                log.info("all that this service serves is done")
                return 0
            if min(hosted.server.idle_s, time.monotonic() - last_at_work) > idle_timeout_s:
                if not at_work():
                    log.info("nobody has asked for %g s", idle_timeout_s)
                    return 0
                last_at_work = time.monotonic()
        except OSError as error:  # those it serves need it all the same
            log.warning("cannot see whether it is needed any more: %s", error)
        if not hosted.server.alive:
            raise RuntimeError("the HTTP server ended by itself; its reason is in the log above")
        if hosted.service.batcher.counters.failed_in_a_row >= HOPELESS_FAILURES:
            raise RuntimeError(f"the model failed {HOPELESS_FAILURES} times in a row; see the log above")
    log.info("told to leave")
    return TOLD_TO_LEAVE


def consumers_done(job: Job) -> bool:
    """True when every stage that this service serves is complete."""
    return all(gate.is_complete(job.ws, job.graph[stage]) for stage in job.stage.serves)


def consumers_at_work(job: Job) -> bool:
    """True while somebody works on a stage that this service serves; False while it waits in the queue."""
    ttl_s = job.config.run.lease_ttl_s
    return any(gate.is_at_work(job.ws, job.graph[stage], ttl_s) for stage in job.stage.serves)


def _on_sigterm(then: Callable[[], None]) -> None:
    """Do so on SIGTERM (walltime, preemption). In the debug executor's threads there are no signals."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: then())


if __name__ == "__main__":
    sys.exit(main())
