"""Manifests: a shard of work is done when its manifest exists, and not before.

A manifest is a small JSON file written last and exclusively. It names every output with size and checksum, and what the
output was made from. If two workers did the same shard (a lease taken over from a holder that was only frozen), the
first manifest stands, and the other worker's files, whose names carry its own token, are never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, overload

from hpc_rl.run import atomic
from hpc_rl.run.workspace import SCHEMA, Workspace

_NAME = re.compile(r"^shard_(\d{4,})\.json$")


@dataclass(frozen=True)
class Output:
    """One file that a shard produced; `path` is relative to the workspace."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard of a stage produced, and from what.

    `made_from` holds inputs, config and code hashes, weights, seeds; `metrics` are numbers for reports; `started` and
    `ended` are seconds since the epoch.
    """

    round: int
    stage: str
    shard: int
    outputs: tuple[Output, ...]
    made_from: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    attempt: str = ""
    host: str = ""
    job_id: str = ""
    started: float = 0.0
    ended: float = 0.0
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The file's text, in a stable order."""
        return atomic.to_json({"schema": self.schema, **{k: v for k, v in asdict(self).items() if k != "schema"}})


class DamagedOutput(RuntimeError):
    """An output whose content is not what its manifest says."""


@dataclass(frozen=True)
class StoredManifest(Manifest):
    """A manifest read from a workspace."""

    root: Path = Path()

    def path(self, ending: str) -> Path:
        """The output whose name ends with `ending`, checked against its size and checksum.

        Raises
        ------
        KeyError
            When there is no such output, or more than one.
        DamagedOutput
            When the file is missing or is not what was written; the message says how to make it again.
        """
        found = [output for output in self.outputs if output.path.endswith(ending)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} outputs of {self.stage} shard {self.shard} end with {ending!r}")
        path = self.root / found[0].path
        try:
            whole = path.stat().st_size == found[0].bytes and sha256_of(path) == found[0].sha256
        except FileNotFoundError:
            whole = False
        if not whole:
            name = manifest_path(Workspace(self.root), self.round, self.stage, self.shard)
            raise DamagedOutput(
                f"{path} is missing or changed since it was written. Remove {name} and launch again to redo it."
            )
        return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_path(ws: Workspace, round: int, stage: str, shard: int) -> Path:
    """Where the manifest of a shard lies."""
    return ws.stage_dir(round, stage) / f"shard_{shard:04d}.json"


def describe_output(ws: Workspace, output: Path | BinaryIO) -> Output:
    """Size and checksum of a finished file, which is forced to disk first.

    Given as the file object through which it was written (mode `w+b`), it need not be opened again.
    """
    if isinstance(output, Path):
        with output.open("rb") as file:
            return describe_output(ws, file)
    output.flush()
    os.fsync(output.fileno())
    output.seek(0)
    sha256 = hashlib.file_digest(output, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed: needs readinto
    return Output(ws.relative(Path(output.name)), os.fstat(output.fileno()).st_size, sha256)


def write(ws: Workspace, manifest: Manifest, folder: int | None = None) -> bool:
    """Declare a shard done. False when it was done already (then ours is void).

    `folder` is a descriptor of the stage's folder, where the caller has it open: four metadata operations (create,
    link, unlink, fsync of the folder) instead of five.
    """
    path = manifest_path(ws, manifest.round, manifest.stage, manifest.shard)
    return atomic.create_exclusive(path, manifest.to_json(), folder=folder)


def read(ws: Workspace, round: int, stage: str, shard: int) -> StoredManifest:
    """The manifest of a shard; FileNotFoundError when it is not done, CorruptFile when it cannot be read."""
    path = manifest_path(ws, round, stage, shard)
    data = atomic.read_json(path)
    try:
        if data["schema"] > SCHEMA:
            raise atomic.CorruptFile(
                f"{path} was written by a newer hpc_rl (schema {data['schema']}, this one reads {SCHEMA})"
            )
        data["outputs"] = tuple(Output(**output) for output in data["outputs"])
        return StoredManifest(**data, root=ws.root)
    except (TypeError, KeyError, AttributeError) as error:
        raise atomic.CorruptFile(f"{path} is not a manifest ({error})") from error


def done_shards(ws: Workspace, round: int, stage: str) -> frozenset[int]:
    """Shards of a stage that have a manifest: one folder listing, no file is opened."""
    try:
        names = os.listdir(ws.stage_dir(round, stage))
    except FileNotFoundError:
        return frozenset()
    return frozenset(int(match[1]) for name in names if (match := _NAME.match(name)))


class Manifests(Sequence[StoredManifest]):
    """The manifests of a finished stage, in shard order. Each is read when it is asked for, and not kept."""

    def __init__(self, ws: Workspace, round: int, stage: str, shards: int) -> None:
        self.ws, self.round, self.stage, self._shards = ws, round, stage, range(shards)

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.ws.stage_dir(self.round, self.stage)

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, index: int) -> StoredManifest: ...

    @overload
    def __getitem__(self, index: slice) -> list[StoredManifest]: ...

    def __getitem__(self, index: int | slice) -> StoredManifest | list[StoredManifest]:
        if isinstance(index, slice):
            return [self[shard] for shard in self._shards[index]]
        return read(self.ws, self.round, self.stage, self._shards[index])


def to_plain(value: Any) -> Any:
    """`value` as JSON can hold it (numpy scalars and paths become numbers and text)."""
    return json.loads(json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else str(x)))
