"""A recipe for tests of the job frame: one array stage of 12 shards, then one that needs it all."""

from __future__ import annotations

from collections.abc import Iterable

from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Kind, Stage, StageId

SHARDS = 12


def stages(config: Config, round: int) -> Iterable[Stage]:
    """cut → join in each round but 0."""
    if round:
        cut, join = StageId(round, "cut"), StageId(round, "join")
        yield Stage(cut, "tests.orchestrate.shards_body", Kind.ARRAY, shards=SHARDS)
        yield Stage(join, "tests.orchestrate.shards_body", Kind.SINGLE, needs=(cut,))
