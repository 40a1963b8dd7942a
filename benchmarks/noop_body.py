"""A job body that claims its shards and writes empty manifests: nothing but the frame that all bodies share."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpc_rl.orchestrate.job import open_job


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    job = open_job("noop", argv)
    for shard in job.shards(leader=job.rank == 0):
        if job.rank == 0:
            shard.commit([], made_from={})
    return 0


if __name__ == "__main__":
    sys.exit(main())
