"""The leases of a stage's shards: thousands of names in one folder (`STAGE/leases`), read in one listing.

A shard's lease is a series of generations as in `hpc_rl.run.lease`, but none is ever removed: the highest one is the
lease, whoever reads an old listing. So a first generation (`shard_0007.lease.0001`) that could be created says by
itself that nobody ever had the shard, and needs no second look. Leases are further names of their holders' files: a
stage of 10 000 shards has 10 000 lease names and one inode per task.

A listing tells more than names: the inode of a lease is that of its holder's file, so who holds what is known without
opening anything, and a holder whose file is not there has given everything back. Whether the others live is asked once
for each, not for each shard, and not again before their hearts can have stopped for `ttl_s`.

`shard_0007.lease.0002.copy` is a second worker on the same shard, at most one for each generation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.lease import lease_path
from hpc_rl.run.presence import PREFIX, Holder, file_system_now, holder_path, see

_NAME = re.compile(r"^shard_(\d{4,})\.lease\.(\d{4,})(\.copy)?$")
READDIR_BYTES = 32_768
"""What one readdir brings (glibc's buffer, and an NFS reply); more names need more of them."""
ENTRY_BYTES = 24
"""What a name takes in a listing besides its letters (getdents(2))."""


def leases_of(stage_folder: Path) -> Path:
    """Where the leases of a stage's shards lie: not between the shards' files, so that a listing of them is short."""
    return stage_folder / "leases"


def progress_path(stage_folder: Path, token: str) -> Path:
    """Where the task with this token says how far it is with the shards in its hands; for `status` only."""
    return stage_folder / "tasks" / f"{token}.progress"


def shard_lease_path(folder: Path, shard: int, generation: int) -> Path:
    """The name of a generation of a shard's lease."""
    return lease_path(folder, f"shard_{shard:04d}", generation)


def copy_path(folder: Path, shard: int, generation: int) -> Path:
    """The name under which a shard that somebody holds is done a second time."""
    lease = shard_lease_path(folder, shard, generation)
    return lease.with_name(f"{lease.name}.copy")


@dataclass(frozen=True)
class Claimed:
    """A shard's latest generation and its copy, with the inodes of their holders."""

    generation: int
    inode: int
    copy_inode: int | None = None


@dataclass
class Listing:
    """The folder's content.

    Attributes
    ----------
    shards
        The shards that were ever claimed.
    holders
        Inode → token, of the holders that have not left.
    operations
        How many metadata operations the listing took.
    """

    shards: dict[int, Claimed] = field(default_factory=dict)
    holders: dict[int, str] = field(default_factory=dict)
    operations: int = 1


def read_listing(folder: Path) -> Listing:
    """One listing of the leases' folder; empty when there is none."""
    found, letters = Listing(), 0
    copies: dict[tuple[int, int], int] = {}
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return found
    with entries:
        for entry in entries:
            name = entry.name
            letters += len(name) + ENTRY_BYTES
            if name.startswith(PREFIX):
                found.holders[entry.inode()] = name.removeprefix(PREFIX)
            elif match := _NAME.match(name):
                shard, generation = int(match[1]), int(match[2])
                if match[3]:
                    copies[shard, generation] = entry.inode()
                elif shard not in found.shards or found.shards[shard].generation < generation:
                    found.shards[shard] = Claimed(generation, entry.inode())
    for (shard, generation), inode in copies.items():
        known = found.shards.get(shard)
        if known is not None and known.generation == generation:
            found.shards[shard] = Claimed(generation, known.inode, inode)
    found.operations = 1 + -(-letters // READDIR_BYTES)
    return found


class Hearts:
    """Which holders of a folder's leases live. Remembers what it saw, so that each is looked at about once per `ttl_s`.

    Parameters
    ----------
    folder, ttl_s
        The leases' folder; how long a holder may show no heartbeat.
    now
        The time on the file system's clock; by default a file is touched to read it.
    """

    def __init__(self, folder: Path, ttl_s: float, now: Callable[[], float] | None = None) -> None:
        self._folder, self._ttl_s = folder, ttl_s
        self._now = now or (lambda: file_system_now(folder))
        self._seen: dict[str, tuple[Holder, float]] = {}

    def beats(self, token: str) -> bool:
        """True while the holder `token`, whose file was there just now, is believed to be alive."""
        now, path = self._now(), holder_path(self._folder, token)
        try:
            if token not in self._seen or self._seen[token][1] + self._ttl_s < now:
                try:
                    self._seen[token] = see(path)
                except CorruptFile:  # nobody yet: it is being written, or its process died before it was
                    return path.stat().st_mtime + self._ttl_s >= now
        except FileNotFoundError:
            return False
        holder, beaten = self._seen[token]
        return beaten + self._ttl_s >= now and not holder.is_known_dead()

    def bury(self, token: str) -> None:
        """Remove the file of a holder that is dead: everybody sees then that its leases are free."""
        holder_path(self._folder, token).unlink(missing_ok=True)


def is_given_back(lease: Path, hearts: Hearts) -> bool:
    """True when the holder of this very lease is gone, as its own file says: before a lease is taken over.

    Listings may be a moment old, and file systems in user space may make inode numbers up.
    """
    token = see(lease)[0].token
    return not (holder_path(lease.parent, token).exists() and hearts.beats(token))
