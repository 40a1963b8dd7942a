"""The job body of benchmarks/sums_recipe.py: the one of the Lewis game, with other prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sums_recipe import Sums, SumsConfig
from hpc_rl.orchestrate.job import open_job
from jobs.sample import sample


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.sums_body --workspace W --round R`"""
    job = open_job("sample", argv)
    from hpc_rl.engines.weights import Weights, weights_hash

    config = job.config
    assert isinstance(config, SumsConfig)
    model = str(config.speaker.path)
    weights = Weights(model, None, weights_hash(Path(model)))
    return sample(job, config.speaker, config.sample, weights, lambda: Sums(config.sample, job.round))


if __name__ == "__main__":
    sys.exit(main())
