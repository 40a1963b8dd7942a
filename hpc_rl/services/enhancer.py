"""The enhancer's HTTP service (S3): a teacher's under its own name, with its own config section and folder."""

from __future__ import annotations

from hpc_rl.config.schema import Config
from hpc_rl.config.services import TeacherServiceConfig
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.frame import Service
from hpc_rl.services.teacher import open_named


def open_service(ws: Workspace, config: Config, round: int, options: TeacherServiceConfig) -> Service:
    """`services.enhancer.model`, or its rules; the same in every round."""
    return open_named("enhancer", options)
