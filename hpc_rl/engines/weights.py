"""Which weights a role has after a round, and the hash that tells them apart from any others."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.config.modeling import TrainedModelConfig
from hpc_rl.engines.model_files import check_unchanged, identity, model_files
from hpc_rl.run import atomic, manifest
from hpc_rl.run.workspace import Workspace

STANDS = "trained_round"
"""Key of a training's `made_from` where it left no weights: the round whose weights are in force still."""


@dataclass(frozen=True)
class Weights:
    """Weights of a role: a base model and, with LoRA, an adapter on top. `hash` tells them apart from any others."""

    base: str
    adapter: Path | None
    hash: str


@dataclass(frozen=True)
class Role:
    """A model that a run trains.

    Attributes
    ----------
    name
        Its weights after a round lie in `checkpoints/NAME/round_NN`.
    model
        Its section of the config.
    stage
        The stage that trains it.
    """

    name: str
    model: TrainedModelConfig
    stage: str = "train"


def weights_of(ws: Workspace, role: Role, round: int) -> Weights:
    """A role after `round` rounds, as the manifest of its training names it; round 0: the model to start from.

    Of a training that left none (given up, or nothing to learn from) the manifest names the round whose weights stand.
    """
    base = str(role.model.path)
    if round == 0:
        return Weights(base, None, noted_hash(Path(base), ws.root / "cache" / "weights"))
    made = manifest.read(ws, round, role.stage, 0)
    if STANDS in made.made_from:
        before = int(made.made_from[STANDS])
        assert before < round, f"round {round} of {role.stage} stands on round {before}"
        return weights_of(ws, role, before)
    folder = ws.checkpoint_dir(role.name, round)
    digest = str(made.made_from.get(f"weights_out_{role.name}", made.made_from["weights_out"]))
    has_adapter = ws.relative(folder / "adapter_config.json") in {output.path for output in made.outputs}
    return Weights(base, folder, digest) if has_adapter else Weights(str(folder), None, digest)


def noted_hash(folder: Path, notes: Path) -> str:
    """`weights_hash`, read from `notes` where it was computed before: else each task would read the whole model for it.

    A note is about files by their path, names, sizes and times of change; whatever changes one of these is hashed anew.

    Raises
    ------
    OSError
        When files change while they are read.
    """
    before = identity(folder, model_files(folder))
    note = notes / f"{before}.json"
    try:
        return str(atomic.read_json(note)["sha256"])
    except FileNotFoundError:
        digest = weights_hash(folder)
        check_unchanged(folder, before)
        atomic.write_json(note, {"of": str(folder), "sha256": digest})
        return digest


def weights_hash(folder: Path) -> str:
    """What tells the weights in a Hugging Face folder apart from any others: SHA-256 over its safetensors files.

    Names and contents count, nothing else: a model has one hash wherever it lies. An adapter's does not cover its base.

    Raises
    ------
    ValueError
        When there are no safetensors: other formats are pickles, and not read.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no *.safetensors. Save the model as safetensors; pickled weights are not read."
        )
    with ThreadPoolExecutor(max_workers=min(8, len(files))) as pool:  # hashing leaves the interpreter lock alone
        sums = list(pool.map(manifest.sha256_of, files))
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, sums, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
