"""Giving a stage up: the manifests of a stage that is left undone, so that what follows can begin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.config.schema import Config
from hpc_rl.engines.weights import STANDS
from hpc_rl.orchestrate.graph import Stage
from hpc_rl.run import manifest
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.manifest import Manifest
from hpc_rl.run.workspace import Workspace

GIVEN_UP = "given_up"
"""The ledger's event, and why in what a manifest is made from."""
TRAINING_BODY = "jobs.train"


def give_up(ws: Workspace, config: Config, stage: Stage, why: str) -> None:
    """Declare the shards of a stage that are not done to be left undone. May be called again after any kill.

    The ledger first: a manifest that nobody can explain would look like work that was done. A shard that is done
    meanwhile stays so.
    """
    Ledger(ws).append(GIVEN_UP, round=stage.round, stage=stage.name, why=why)
    ws.stage_dir(stage.round, stage.name).mkdir(parents=True, exist_ok=True)
    now = round(time.time(), 3)
    made_from = {"config": configs.config_hash(config), GIVEN_UP: why, **_instead(config, stage)}
    for shard in sorted({*range(stage.shards)} - manifest.done_shards(ws, stage.round, stage.name)):
        manifest.write(ws, Manifest(stage.round, stage.name, shard, (), made_from, started=now, ended=now))


def _instead(config: Config, stage: Stage) -> Mapping[str, Any]:
    """Of a training: the round whose weights stand (`hpc_rl.engines.weights.weights_of`)."""
    if stage.job != TRAINING_BODY:
        return {}
    return {STANDS: recipes.load(config.recipe).training(config, stage.id).trained_round}
