"""What sampling asks of whoever hands out shards. `hpc_rl.orchestrate.claims` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol


class Shard(Protocol):
    """A claimed shard."""

    @property
    def index(self) -> int:
        """Which shard of the stage."""

    def output(self, name: str) -> Path:
        """A path that no other claim writes to."""

    def create(self, name: str) -> BinaryIO:
        """The output `name`, open for writing and for its commit."""

    def commit(
        self,
        outputs: Sequence[Path | BinaryIO],
        *,
        made_from: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Declare the shard done; False when somebody else was faster."""

    def abandon(self) -> None:
        """Give the claim back; does nothing once the shard is done, or the second time."""


class Claims(Protocol):
    """Hands out shards. Its methods are called in one thread, those of its shards in others."""

    def next(self) -> Shard | None:
        """A free shard, ours now; None when all that is left is in other hands."""

    def duplicate(self) -> Shard | None:
        """A copy of a shard that somebody else is still at; None when there is none."""

    def all_done(self) -> bool:
        """True when every shard has its manifest."""

    def free(self) -> int:
        """How many shards nobody had at the last look, as far as we know."""

    def peers(self) -> int:
        """How many tasks share the stage and are alive, this one included."""

    @property
    def pause_s(self) -> float:
        """How long it makes no sense to ask `next` again, after it gave None."""

    def overtaken(self, shards: Sequence[Any]) -> Sequence[Any]:
        """Those of `shards` that others have published or taken over."""

    def progress(self, done: int, total: int) -> None:
        """How far the shards in hand are, for `status`."""
