"""What a stage kept for its next attempts and has no use for once it is done: checkpoints of a killed clean-up (L23).

A training removes its own once it is committed. A kill between the two would leave several times the model's size for
ever: nobody runs that stage again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable

from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.graph import Stage
from hpc_rl.run.workspace import Workspace

CHECKPOINTS = "checkpoints"
"""Folder in a stage's own."""

log = logging.getLogger(__name__)


def remove_spent(ws: Workspace, stages: Iterable[Stage]) -> None:
    """Remove the checkpoints of those of `stages` that are done. Whoever does it at the same time is no trouble."""
    for stage in stages:
        folder = ws.stage_dir(stage.round, stage.name) / CHECKPOINTS
        if folder.is_dir() and gate.is_complete(ws, stage):
            log.info("removing %s: the stage is done", folder)
            shutil.rmtree(folder, ignore_errors=True)
            if folder.is_dir():
                log.warning("%s cannot be removed as a whole; it is not needed any more", folder)
