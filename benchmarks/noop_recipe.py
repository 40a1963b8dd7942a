"""A recipe that does nothing: 3 rounds × 5 stages of jobs that start and end, to measure what orchestration costs.

It is also the shortest example of a recipe of your own: `recipe: benchmarks.noop_recipe` in a config.
"""

from __future__ import annotations

from collections.abc import Iterable

from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Kind, Stage, StageId

ARRAY_TASKS = 4


def stages(config: Config, round: int) -> Iterable[Stage]:
    """sample (4-task array) → grade → score → train (2 nodes) → evaluate; nothing in round 0."""
    if round == 0:
        return
    before: tuple[StageId, ...] = (StageId(round - 1, "evaluate"),) if round > 1 else ()
    for name, kind, shards in (
        ("sample", Kind.ARRAY, ARRAY_TASKS),
        ("grade", Kind.SINGLE, 1),
        ("score", Kind.SINGLE, 1),
        ("train", Kind.MULTINODE, 1),
        ("evaluate", Kind.SINGLE, 1),
    ):
        stage = Stage(StageId(round, name), "benchmarks.noop_body", kind, needs=before, shards=shards)
        before = (stage.id,)
        yield stage
