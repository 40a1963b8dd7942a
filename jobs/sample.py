"""Job body of a stage that samples: completions of each prompt of the round, as the recipe's `sampling` says."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hpc_rl import recipes
from hpc_rl.cluster.failures import EXIT_BLOCKED, EXIT_NEVER_FITS, EXIT_OUT_OF_TIME
from hpc_rl.cluster.walltime import Deadline
from hpc_rl.orchestrate.blocked import blocked
from hpc_rl.orchestrate.job import Job, open_job
from hpc_rl.run import manifest
from hpc_rl.sampling.source import SampleTask
from hpc_rl.training.task import find

if TYPE_CHECKING:
    from hpc_rl.engines.described import DescribedEngine

log = logging.getLogger("hpc_rl")


@blocked
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.sample --workspace W --round R`; `--stage` where the recipe calls it something else."""
    job = open_job("sample", argv)
    return sample(job, recipes.load(job.config.recipe).sampling(job.config, job.stage.id))


def sample(job: Job, task: SampleTask) -> int:
    """Sample shards of the stage until there are none to be had; the exit code.

    The source is made before the engine is started, and all its prompts and its stops are checked then, so that what is
    wrong with them is said first; `sample.long_prompts` says what becomes of long ones.

    Returns
    -------
    int
        0; 124 when the rest does not fit before the time limit, 76 when not a single shard does; 75 when the stage's
        only shard is in other hands, or when the engine is to be started again (`SlotLost`).

    Raises
    ------
    PromptError
        For prompts or stops that cannot be sampled from, before the engine starts.
    """
    from hpc_rl.engines.engine_spec import EngineSpec
    from hpc_rl.engines.gpus import check_gpus
    from hpc_rl.engines.memory import notches_of, note_notches
    from hpc_rl.engines.pool_opening import open_engines
    from hpc_rl.engines.weights import weights_of
    from hpc_rl.sampling.at_work import Origin
    from hpc_rl.sampling.checked import check_source
    from hpc_rl.sampling.pace import NeverFits
    from hpc_rl.sampling.record import Recorder
    from hpc_rl.sampling.stream import Ending, Stream

    check_gpus(job.config, job.stage.name)
    model, options = task.role.model, task.options
    weights = weights_of(job.ws, task.role, task.trained_round)
    made_from: dict[str, Any] = {"temperature": options.temperature}
    # the engine is closed last: that may take seconds, and others wait for the shards that are given back
    with ExitStack() as engines, job.claims() as claims, ExitStack() as stack:
        gpus = job.config.stage(job.stage.name).gpus_per_node
        recorder = stack.enter_context(Recorder(job.folder, claims.token, gpus))

        def opened(engine: DescribedEngine) -> None:
            recorder.opened(engine.description, engine.loading)
            note_notches(job.ws, job.round, job.stage.name, engine.description)

        def start_engine() -> DescribedEngine:
            notches = notches_of(job.ws, job.round, job.stage.name)
            engine = open_engines(EngineSpec(options.engine, model, options, weights, job.ws.compile_cache, notches))
            engines.callback(engine.close)
            opened(engine)
            stack.callback(opened, engine)  # workers may have been replaced
            made_from["engine"] = dict(engine.description)
            log.info("sampling from weights %s", weights.hash[:16])
            return engine

        stream = Stream(
            claims,
            start_engine,
            check_source(find(task.source)(job), job.stage.shards, weights.base, model, options),
            Origin(job.config.run.seed, job.round, weights.hash, claims.token, made_from),
            recorder,
            deadline=Deadline.of(os.environ),
            linger_s=job.config.run.linger_s,
            speculate=options.speculate,
        )
        try:
            ending = stream.run()
        except NeverFits as error:
            log.error("NeverFits: %s", error)
            return EXIT_NEVER_FITS
    if ending is Ending.OTHERS:
        left = job.stage.shards - len(manifest.done_shards(job.ws, job.round, job.stage.name))
        log.warning("leaving %s: %d shards are in other hands", job.stage.id, left)
    if ending is Ending.OUT_OF_TIME:
        return EXIT_OUT_OF_TIME
    return EXIT_BLOCKED if ending is Ending.OTHERS and job.stage.shards == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
