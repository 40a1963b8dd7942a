"""Beside the loop: a thread that claims shards and reads their prompts, so that the engine waits for neither."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from hpc_rl.sampling.at_work import AtWork
from hpc_rl.sampling.claiming import Claims, Shard
from hpc_rl.sampling.source import Source

log = logging.getLogger("hpc_rl")


class Ahead:
    """Asks for one shard at a time. Its own methods return at once, `all_done` and `close` excepted."""

    def __init__(self, claims: Claims, source: Source) -> None:
        self._claims, self._source = claims, source
        self._thread = ThreadPoolExecutor(1, "claims")
        self._looking: Future[Sequence[Shard]] | None = None
        self._numbers = 0
        self.claiming: Future[AtWork | None] | None = None

    def claim(self, held: int, bored: bool) -> None:
        """Begin to claim a shard, or, if there is none and we are bored, a copy of one that somebody else is at."""
        assert self.claiming is None
        self.claiming = self._thread.submit(self._claim, held, bored)

    def take(self) -> AtWork | None:
        """What was claimed, once `claiming` is done; None when there was nothing for us."""
        assert self.claiming is not None
        future, self.claiming = self.claiming, None
        return future.result()

    def _claim(self, held: int, bored: bool) -> AtWork | None:
        """The last shards are for all tasks that are alive: one that holds its share leaves the rest to the others."""
        free = self._claims.free()
        if held and free and held * self._claims.peers() >= held + free:
            return None
        shard, is_copy = self._claims.next(), False
        if shard is None and bored:
            shard, is_copy = self._claims.duplicate(), True
        if shard is None:
            return None
        if is_copy:
            log.info("shard %d is done here too: its holder takes longer than usual", shard.index)
        tasks = self._source.tasks(shard.index)
        _read_ahead(image for task in tasks for image in task.prompt.images if isinstance(image, Path))
        self._numbers += 1
        dropped = self._source.dropped(shard.index)
        return AtWork(shard, self._numbers, tasks, self._source.rules, dropped, is_copy)

    @property
    def pause_s(self) -> float:
        """How long it makes no sense to claim again when there was nothing."""
        return self._claims.pause_s

    def look(self, shards: Sequence[Shard], done: int, total: int) -> None:
        """Begin to say how far these shards are, and to see which of them others have done; nothing while it does."""
        if self._looking is None:
            self._looking = self._thread.submit(self._look, shards, done, total)

    def overtaken(self) -> Sequence[Shard]:
        """What a look has found, once."""
        if self._looking is None or not self._looking.done():
            return ()
        future, self._looking = self._looking, None
        return future.result()

    def _look(self, shards: Sequence[Shard], done: int, total: int) -> Sequence[Shard]:
        self._claims.progress(done, total)
        gone = self._claims.overtaken(shards)
        for shard in gone:
            shard.abandon()
        return gone

    def all_done(self) -> bool:
        """True when every shard of the stage has its manifest."""
        return self._thread.submit(self._claims.all_done).result()

    def close(self) -> None:
        """Wait for the thread. What it has claimed meanwhile is the claims' to give back."""
        self._thread.shutdown(cancel_futures=True)


def _read_ahead(files: Iterable[Path]) -> None:
    """Have these files in the node's memory when the engine opens them.

    They are not decoded here: a photo of 1 MB on disk is 36 MB then, and would stay for as long as its shard does.
    """
    for file in dict.fromkeys(files):
        with suppress(OSError):  # whoever opens it says what is wrong, and with which row
            file.read_bytes()
