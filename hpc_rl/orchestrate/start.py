"""Making the workspace of a run, or opening the one that is there: the first writes the config, the others agree."""

from __future__ import annotations

import shutil
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.run import atomic
from hpc_rl.run.workspace import Workspace


class OtherConfig(RuntimeError):
    """The workspace belongs to a run with another config; the message names the differing keys and the ways out."""


def open_run(config: Config, config_file: Path) -> tuple[Run, list[str]]:
    """The run of `config` in its workspace, which is made if it is not there.

    A config that differs only in circumstances (where and how patiently it runs, more rounds) replaces the stored one.

    Returns
    -------
    run, notes
        `notes` says what was taken over or changed.

    Raises
    ------
    OtherConfig
        When the workspace holds another experiment.
    """
    ws = Workspace(config.run.workspace)
    notes = []
    if not atomic.create_exclusive(ws.config_path, atomic.to_json(configs.to_json(config))):
        stored = configs.from_json(atomic.read_json(ws.config_path))
        if differing := configs.differing_keys(stored, config):
            raise OtherConfig(_refusal(ws, config, config_file, differing))
        if configs.to_json(stored) != configs.to_json(config):
            if config.run.rounds < stored.run.rounds:
                notes.append(
                    f"run.rounds goes down from {stored.run.rounds} to {config.run.rounds}: "
                    "later rounds stay on disk, unused"
                )
            atomic.write_json(ws.config_path, configs.to_json(config))
            notes.append(
                "the stored config was updated where it may change (cluster, stages' resources, patience, rounds)"
            )
    if config_file.is_file():
        shutil.copyfile(config_file, ws.root / config_file.name)
    for folder in (ws.lease_folder, ws.tb_dir):
        folder.mkdir(parents=True, exist_ok=True)
    return Run(ws, config, recipes.graph_of(config)), notes


def _refusal(ws: Workspace, config: Config, config_file: Path, differing: list[tuple[str, object, object]]) -> str:
    lines = [f"{ws.root} holds a run with another config. It differs in:"]
    lines += [f"    {key}: {old!r} there, {new!r} in {config_file}" for key, old, new in differing[:20]]
    if len(differing) > 20:
        lines.append(f"    … and {len(differing) - 20} more keys")
    lines += [
        "Ways out:",
        f"    a new run:        --workspace {ws.root}-2",
        "    go on with it:    undo the changes above (what concerns only where and how it runs may differ)",
        f"    start afresh:     move the folder away first: mv {ws.root} {ws.root}.old",
    ]
    return "\n".join(lines)
