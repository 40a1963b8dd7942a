"""The loop of a sampling task: shards are claimed before the engine runs dry, and leave with their last sample.

    claim ahead → hand requests over → one step of the engine → judge, retry → publish what is complete → …

Requests of many shards are in flight at once, so the batch stays full across their borders; a retry goes straight back
into it. Claiming, reading rows, prompts and images, and publishing happen in threads beside the loop, so that a full
batch does not wait for the file system. What is held is bounded by what is in flight, whatever the number of shards.

A sample depends on its prompt and its own seed, and a shard's file is sorted: it is the same whoever made it, in
whatever order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from enum import StrEnum
from typing import Any

from hpc_rl.cluster.walltime import Deadline
from hpc_rl.engines.base import Engine
from hpc_rl.grading.samples import load_writer
from hpc_rl.sampling.ahead import Ahead
from hpc_rl.sampling.at_work import AtWork, Origin
from hpc_rl.sampling.batch import Batch
from hpc_rl.sampling.claiming import Claims
from hpc_rl.sampling.leaving import Leaving
from hpc_rl.sampling.pace import Pace
from hpc_rl.sampling.record import Recorder
from hpc_rl.sampling.source import Source

log = logging.getLogger("hpc_rl")

POLL_S = 0.1
"""Shortest pause between two questions for a shard when there was none."""
LOOK_EVERY_S = 5.0
"""Pause between two looks at whether others have done what is under way here."""
WAIT_S = 0.1
"""Longest wait for the file system in one turn, when the engine has nothing to do."""
UNPUBLISHED = 8
"""Complete shards that wait for the file system; with more no further one is claimed."""


class Ending(StrEnum):
    """Why the loop ended."""

    DONE = "all shards are done"
    OTHERS = "what is left is in other hands"
    OUT_OF_TIME = "what is left does not fit before the time limit"


class Stream:
    """Samples shards until there are none.

    Parameters
    ----------
    claims, source
        Where shards come from, and what is asked.
    open_engine
        Starts what samples; called once there is a shard to sample, so that a task without work costs nothing.
    origin
        From what samples are drawn.
    task
        Keeps account of the task's time.
    deadline
        No shard is begun that would not be finished before it.
    linger_s
        How long to wait, without work, for shards in other hands.
    speculate
        Sample a shard that another task is slow with a second time, rather than wait.
    """

    def __init__(
        self,
        claims: Claims,
        open_engine: Callable[[], Engine],
        source: Source,
        origin: Origin,
        task: Recorder,
        *,
        deadline: Deadline,
        linger_s: float,
        speculate: bool,
    ) -> None:
        self._open, self._source, self._origin, self._task = open_engine, source, origin, task
        self._linger_s, self._speculate = linger_s, speculate
        self._ahead = Ahead(claims, source)
        self._pace = Pace(deadline)
        self._batch = Batch(origin, source.sampling)
        self._shards: dict[int, AtWork] = {}
        self._publishers = ThreadPoolExecutor(2, "publish")
        self._publishing: dict[Future[bool], AtWork] = {}
        self._requests_per_shard = 1
        self._ask_at = self._look_at = 0.0
        self._idle_since: float | None = None
        self._bored = self._copying = False  # who has made one copy does not wait before the next
        self._leaving = Leaving()

    def run(self) -> Ending:
        """Work until there is nothing left to do here; says why.

        Raises
        ------
        SystemExit
            128 + 15 after SIGTERM. Complete shards are published before.
        WriteFailure
            When a shard cannot be written.
        NeverFits
            When it had to leave at the end of its time, and that was too short for a single shard.
        ValueError, EngineFailed
            When the engine refuses a prompt, or dies of it; the message names its row.
        """
        with self._leaving:
            try:
                while (ending := self._turn()) is None:
                    pass
            except SystemExit:
                if self._shards:
                    self._pace.check_that_one_fits(min(work.since for work in self._shards.values()))
                raise
            finally:
                self._wind_up()
        log.info("%s", ending.value)
        return ending

    def _turn(self) -> Ending | None:
        self._leaving.check()
        until = self._batch.fill_until
        self._claim(until)
        if len(self._batch):
            self._sample(until)
        elif self._publishing or self._ahead.claiming:
            self._wait_for([*self._publishing, self._ahead.claiming], WAIT_S)
        self._settle()
        self._look_around()
        return None if self._shards or self._publishing or self._ahead.claiming else self._without_work()

    def _wait_for(self, files: Iterable[Future[Any] | None], longest_s: float) -> None:
        """Wait for a claim, or for a shard to be published."""
        with self._task.during("publishing"), self._leaving.at_once():
            wait(filter(None, files), timeout=longest_s, return_when=FIRST_COMPLETED)

    # shards in

    def _claim(self, until: float) -> None:
        """Take in what has been claimed, and claim on; an engine that is not busy waits for it till then."""
        self._take_in()
        self._claim_ahead()
        while self._ahead.claiming and len(self._batch) < self._batch.capacity and time.monotonic() < until:
            self._wait_for([self._ahead.claiming], until - time.monotonic())
            self._take_in()
            self._claim_ahead()

    def _claim_ahead(self) -> None:
        """Claim one more shard when what is in hand would leave the engine with less than a shard to spare."""
        in_hand = len(self._batch)
        enough = self._batch.capacity + self._requests_per_shard if self._batch.is_open else 1
        if (
            self._ahead.claiming is None
            and in_hand < enough
            and len(self._publishing) < UNPUBLISHED
            and time.monotonic() >= self._ask_at
            and self._pace.has_time()
        ):
            idle_s = 0.0 if self._idle_since is None else time.monotonic() - self._idle_since
            waited = self._copying or idle_s >= min(self._pace.usual_s(), self._linger_s / 2)
            self._bored = self._speculate and not in_hand and waited
            self._ahead.claim(len(self._shards), self._bored)

    def _take_in(self) -> None:
        if self._ahead.claiming is None or not self._ahead.claiming.done():
            return
        work = self._ahead.take()
        if work is None:
            goes_on = self._copying and not self._bored  # with the next copy, once this one is done
            self._ask_at = time.monotonic() + (POLL_S if goes_on else max(POLL_S, self._ahead.pause_s))
            self._copying = goes_on
            return
        self._copying = work.is_copy
        self._idle_since = None
        self._shards[work.number] = work
        attempts = work.start()
        self._requests_per_shard = max(1, len(attempts))
        self._batch.append(work, attempts)
        self._publish_if_done(work)

    # the engine

    def _sample(self, until: float) -> None:
        """One step of the engine; what has finished is judged, and what it calls for goes back into the batch."""
        if not self._batch.is_open:
            with self._leaving.at_once():
                load_writer()  # rather than in mid-sampling
                self._batch.open(self._open())
            return  # its batch may be larger than one shard
        self._task.enter("sampling")
        self._batch.hand_over(until)
        self._task.at_work_on(self._batch.submitted, self._batch.capacity)
        with self._leaving.at_once():
            finished = self._batch.step()
        self._task.at_work_on(self._batch.submitted, self._batch.capacity)
        if not finished:
            return
        with self._task.during("judging"):
            for work, attempt, completion in finished:
                self._task.drew(len(completion.token_ids), len(completion.prompt_token_ids))
                outcome = self._source.judge(attempt.task, completion)
                self._batch.push(work, work.finished(attempt, completion, outcome))
                self._publish_if_done(work)

    # shards out

    def _publish_if_done(self, work: AtWork) -> None:
        if work.done:
            del self._shards[work.number]
            self._ask_at = 0.0
            self._pace.finished(work.since)
            self._publishing[self._publishers.submit(work.publish, self._origin)] = work

    def _settle(self) -> None:
        """Account for what has been published; raise what went wrong."""
        for future in [future for future in self._publishing if future.done()]:
            work = self._publishing.pop(future)
            if future.result():
                self._task.published(work.tokens)
            else:
                self._task.lost(work.tokens)

    def _look_around(self) -> None:
        """Now and then: say how far we are, and drop shards that others have done meanwhile."""
        gone = self._ahead.overtaken()
        for work in [work for work in self._shards.values() if work.shard in gone]:
            self._drop(work)
        if self._shards and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_EVERY_S
            drawn = sum(work.drawn for work in self._shards.values())
            total = drawn + len(self._batch)
            self._ahead.look([work.shard for work in self._shards.values()], drawn, total)

    def _drop(self, work: AtWork) -> None:
        log.info("shard %d is left to who has published it or taken it over", work.shard.index)
        self._batch.drop(work)
        del self._shards[work.number]
        self._task.lost(work.tokens)

    # the ends

    def _without_work(self) -> Ending | None:
        """Nothing is in flight, and nothing was free at the last look: leave, or wait a little."""
        now = time.monotonic()
        if self._ahead.all_done():
            return Ending.DONE
        if self._pace.time_is_up:
            return Ending.OUT_OF_TIME
        if self._idle_since is None:
            self._idle_since = now
            self._task.enter("waiting")
            self._task.at_work_on(0, self._batch.capacity)
        if now - self._idle_since > self._linger_s:
            return Ending.OTHERS
        with self._leaving.at_once():
            time.sleep(max(0.0, self._ask_at - now))
        return None

    def _wind_up(self) -> None:
        """Publish what is complete and stop the threads; what is not complete is lost, and the claims' to give back."""
        self._ahead.close()
        self._publishers.shutdown()
        for work in self._shards.values():
            self._task.lost(work.tokens)
        if self._shards:
            log.info("%d shards in hand are given back unfinished", len(self._shards))
        self._settle()
