"""The right to do one thing, held by one process at a time and taken over when its holder dies.

A lease is a series of *generations*: `NAME.lease.0001`, `.0002`, … Each is created exclusively, as a name of its
holder's file (`hpc_rl.run.presence`); the highest one is the lease. It is free when its holder is gone: has given it
back, shows no heartbeat for `ttl_s`, or is known to be dead. Taking over means creating the next generation, which only
one process can; nothing is ever overwritten, so a late take-over cannot steal a lease that was renewed meanwhile.
Lower generations are removed by the holder of a higher one.

What this does not promise: a holder that was frozen and wakes up does not know at once that it lost its lease. So work
ends in an exclusive manifest (`hpc_rl.run.manifest`), and of two workers the first wins and the second is thrown away.

This is for the leases of a run, of which there are two. A stage's shards are claimed by the thousand:
`hpc_rl.run.shard_leases`.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.run.presence import Holder, Presence, file_system_now, holder_path, see

_GENERATION = re.compile(r"\.lease\.(\d{4,})$")


def lease_path(folder: Path, name: str, generation: int) -> Path:
    """The name of a generation of a lease."""
    return folder / f"{name}.lease.{generation:04d}"


@dataclass(frozen=True)
class LeaseState:
    """What a look at a lease found: nobody ever held it (generation 0), or its latest generation."""

    generation: int
    holder: Holder | None
    age_s: float
    released: bool

    def is_held(self, ttl_s: float) -> bool:
        """True while its holder is believed to be alive and at work."""
        return self.holder is not None and not self.released and self.age_s <= ttl_s and not self.holder.is_known_dead()


def _generations(folder: Path, name: str) -> dict[int, Path]:
    prefix = f"{name}.lease."
    found = {}
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return {}
    for entry in entries:
        match = _GENERATION.search(entry)
        if match and entry.startswith(prefix) and entry[: match.start()] == name:
            found[int(match[1])] = folder / entry
    return found


def look(folder: Path, name: str) -> LeaseState:
    """The state of lease `name` in `folder`, without touching it."""
    while True:
        generations = _generations(folder, name)
        if not generations:
            return LeaseState(0, None, 0.0, True)
        generation = max(generations)
        try:
            holder, beaten = see(generations[generation])
        except FileNotFoundError:
            continue  # a higher generation replaced it while we looked
        released = not holder_path(folder, holder.token).exists()
        return LeaseState(generation, holder, file_system_now(folder) - beaten, released)


class Lease:
    """A lease that this process holds until `release`.

    Use `acquire` to get one. As a context manager it is released on exit.
    """

    def __init__(self, folder: Path, name: str, generation: int, presence: Presence) -> None:
        self.folder, self.name, self.generation, self._presence = folder, name, generation, presence
        self.path = lease_path(folder, name, generation)

    @property
    def token(self) -> str:
        """Unique to this holding of the lease."""
        return self._presence.token

    @property
    def holder(self) -> Holder:
        """This process, as others see it."""
        return self._presence.holder

    @property
    def lost(self) -> bool:
        """True once somebody else has taken this lease over, or may."""
        return self._presence.taken_for_dead or max(_generations(self.folder, self.name), default=0) != self.generation

    def release(self) -> None:
        """Give the lease back, so that the next holder need not wait for it to become stale."""
        self._presence.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(folder: Path, name: str, ttl_s: float) -> Lease | None:
    """Take the lease `name` in `folder` if it is free or stale; None when somebody holds it or was faster.

    Parameters
    ----------
    folder, name
        Where the lease's files lie, and what they are called.
    ttl_s
        A holder that shows no heartbeat for this long is taken for dead. On a file system that shows changes late it
        must include that lag.
    """
    state = look(folder, name)
    if state.is_held(ttl_s):
        return None
    generation = state.generation + 1
    presence = Presence(folder, ttl_s)
    if not presence.link(lease_path(folder, name, generation)):
        presence.close()
        return None
    generations = _generations(folder, name)
    if max(generations, default=generation) > generation:
        lease_path(folder, name, generation).unlink(missing_ok=True)  # we built on a view that was out of date
        presence.close()
        return None
    if state.holder is not None:
        holder_path(folder, state.holder.token).unlink(missing_ok=True)
    for lower in sorted(set(generations) - {generation}):
        generations[lower].unlink(missing_ok=True)
    return Lease(folder, name, generation, presence)


def acquire_patiently(folder: Path, name: str, ttl_s: float, patience_s: float, poll_s: float = 0.2) -> Lease | None:
    """`acquire`, tried again for up to `patience_s`."""
    deadline = time.monotonic() + patience_s
    while (lease := acquire(folder, name, ttl_s)) is None and time.monotonic() < deadline:
        time.sleep(poll_s)
    return lease
