"""The verifier's HTTP service (V): a reward model's under its own name, with its own config section and folder."""

from __future__ import annotations

from hpc_rl.config.schema import Config
from hpc_rl.config.services import RewardModelServiceConfig
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.frame import Service
from hpc_rl.services.reward_model import open_named


def open_service(ws: Workspace, config: Config, round: int, options: RewardModelServiceConfig) -> Service:
    """`services.verifier.model`; the same in every round."""
    return open_named("verifier", options)
