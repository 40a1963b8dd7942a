"""Where an engine reads its weights: where they lie, on the node's own disk, or merged with their adapter."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hpc_rl.config.phases import SamplingConfig
from hpc_rl.engines.node_disk import NETWORK, NoNodeFolder, node_folder
from hpc_rl.engines.staging import Staging


@dataclass(frozen=True)
class Placed:
    """Weights in their place.

    Attributes
    ----------
    base, adapter
        Model folder, and LoRA folder on top or None.
    on_node
        They are read from this node's own disk.
    about
        For the engine's description.
    loading
        Seconds by part.
    """

    base: str
    adapter: Path | None
    on_node: bool = False
    about: dict[str, object] = field(default_factory=dict)
    loading: dict[str, float] = field(default_factory=dict)


def place_weights(
    base: str,
    adapter: Path | None,
    sample: SamplingConfig,
    dtype: str,
    *,
    trained: bool,
    merges: bool,
    lent: ExitStack,
) -> Placed:
    """Copy and merge as the config says.

    An adapter that is not merged is small, and read from where it lies. A merged model is made once per node, in
    `stage_to`, where it stays for the next ones, or else in the folder for temporary files, until nobody uses it.

    Parameters
    ----------
    trained
        `base` was made by a round of this run, beside those of other rounds.
    merges
        The engine merges an adapter in memory, so that without `stage_to` nothing need be written.
    lent
        Gets what must be given back when the weights are not read any more.

    Raises
    ------
    ValueError
        NoNodeFolder and NoRoom when `stage_to`, or the folder for temporary files, cannot be used.
    """
    merged = adapter is not None and sample.merge_adapter
    started = time.monotonic()
    if sample.stage_to is None and (not merged or merges):
        return Placed(base, adapter)
    staging = Staging(node_folder(sample.stage_to, os.environ) if sample.stage_to is not None else _temporary())
    if adapter is not None and merged:
        copy = staging.merged(Path(base), adapter, dtype)
    else:
        copy = staging.model(Path(base), of_a_round=trained)
    lent.callback(copy.close if sample.stage_to is not None else lambda: staging.remove(copy))
    about: dict[str, object] = {
        "staged": str(copy.path),
        "staged_by": "this process" if copy.how == "made" else "another process",
        "file_system": staging.file_system,
    }
    part = "merging" if merged else "staging"
    on_node = sample.stage_to is not None or staging.file_system not in NETWORK
    return Placed(str(copy.path), None if merged else adapter, on_node, about, {part: time.monotonic() - started})


def _temporary() -> Path:
    try:
        return node_folder(tempfile.gettempdir(), os.environ)
    except NoNodeFolder as error:
        raise NoNodeFolder(
            f"merge_adapter needs a folder for the merged model, and {tempfile.gettempdir()} (TMPDIR) is none: "
            f"{error}. Name one in sample.stage_to"
        ) from error
