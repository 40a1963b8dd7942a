"""Making the workspace of a run, or opening the one that is there: the first writes the config, the others agree."""

from __future__ import annotations

from pathlib import Path

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.run import atomic
from hpc_rl.run.closed import make_closed
from hpc_rl.run.workspace import Workspace


class OtherConfig(RuntimeError):
    """The workspace belongs to a run with another config; the message names the differing keys and the ways out."""


def open_run(config: Config, config_file: Path) -> Run:
    """The run of `config` in its workspace, which is made if it is not there. One that is there is not changed.

    Raises
    ------
    OtherConfig
        When the workspace holds another experiment.
    NotClosed
        When its folder belongs to somebody else.
    """
    ws = Workspace(config.run.workspace)
    if not ws.config_path.exists():
        make_closed(ws.root)
    if not atomic.create_exclusive(ws.config_path, atomic.to_json(configs.to_json(config))):
        stored = configs.from_json(atomic.read_json(ws.config_path))
        if differing := configs.differing_keys(stored, config):
            raise OtherConfig(_refusal(ws, config, config_file, differing))
    return Run(ws, config, recipes.graph_of(config))


def store_config(run: Run, config_file: Path) -> list[str]:
    """Make the run's config the one that its jobs read, with the user's YAML beside it; returns what changed by that.

    For a run that nobody else drives. `open_run` has seen to it that only circumstances differ: where and how
    patiently it runs, or more rounds.
    """
    ws, config, notes = run.ws, run.config, []
    stored = configs.from_json(atomic.read_json(ws.config_path))
    if configs.to_json(stored) != configs.to_json(config):
        if config.run.rounds < stored.run.rounds:
            notes.append(
                f"run.rounds goes down from {stored.run.rounds} to {config.run.rounds}: "
                "later rounds stay on disk, unused"
            )
        atomic.write_json(ws.config_path, configs.to_json(config))
        notes.append("the stored config was updated where it may change (cluster, stages' resources, patience, rounds)")
    if config_file.is_file():
        atomic.write_bytes(ws.root / config_file.name, config_file.read_bytes())
    ws.tb_dir.mkdir(exist_ok=True)
    return notes


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
