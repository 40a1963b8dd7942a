"""The servers of a service as a client sees them: who is published, who really answers, who is least busy.

A record in the handoff folder is believed only after the server at its address has repeated the record's nonce: a port
of a server that died may belong to somebody else by now. The token is never sent before that.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.services import handoff
from hpc_rl.services.circuit import JITTER, Circuit
from hpc_rl.services.records import Endpoint
from hpc_rl.services.wire import Broken, Wire

log = logging.getLogger(__name__)

REFRESH_S = 8.0
REFRESH_SOON_S = 1.0
POLL_S = 0.5
HEALTH_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Replica:
    """One server. `nonce` is empty where the user gave the URL; then any server there will do."""

    url: str
    nonce: str
    circuit: Circuit
    weights_hash: str = ""
    outstanding: int = 0
    proof: asyncio.Task[bool] | None = None


class Replicas:
    """All servers of one service, looked up in the handoff folder again and again. Belongs to one event loop.

    Parameters
    ----------
    folder
        The service's handoff folder.
    url
        Base URL of one server to use instead; None = those in the folder.
    wire
        Connections to use.
    rng
        Breaks ties between replicas that are equally busy.
    weights_hash
        Servers of other weights are left out; "" = any.
    token
        Reads the token: a server at `url` says only to those who have it which weights it serves.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None,
        wire: Wire,
        rng: random.Random,
        weights_hash: str,
        token: Callable[[], str | None],
    ) -> None:
        self._folder, self._wire, self._rng, self._fixed = folder, wire, rng, url is not None
        self._weights_hash, self._token = weights_hash, token
        self._known: dict[str, Replica] = {url: Replica(url, "", Circuit(rng))} if url else {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._in_trouble = True
        self._told: set[str] = set()
        self._silence = f"{url or f'what is published in {folder}'} has not answered yet"
        self.problem = self._silence
        self._none_fits = False

    @asynccontextmanager
    async def least_busy(self, avoid: Collection[Replica] = ()) -> AsyncIterator[Replica]:
        """The replica with the fewest calls under way, for one call more; waits until there is one.

        Parameters
        ----------
        avoid
            Taken only where there are no others.
        """
        while True:
            under_way = self._tend()
            closed = [replica for replica in self._known.values() if replica.circuit.state() == "closed"]
            if closed:
                break
            pause_s = POLL_S * (1 + JITTER * self._rng.random())
            if under_way:
                done, _ = await asyncio.wait(under_way, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a token that is not to be trusted is an error for those who wait
            else:
                await asyncio.sleep(pause_s)
        replica = min(closed, key=lambda r: (r in avoid, r.outstanding, self._rng.random()))
        replica.outstanding += 1
        try:
            yield replica
        finally:
            replica.outstanding -= 1

    async def settle(self) -> str:
        """The weights that a server which answers serves; servers of others are left out from now on."""
        async with self.least_busy() as replica:
            self._weights_hash = self._weights_hash or replica.weights_hash
            self._known = {n: one for n, one in self._known.items() if one.weights_hash == self._weights_hash}
            return self._weights_hash

    def trouble(self, problem: str) -> None:
        """A call did not go well: the folder is read again soon."""
        self.problem, self._in_trouble = problem, True

    async def prove(self, replica: Replica) -> bool:
        """Ask on a new connection who is there; False when it is not the server that was published."""
        try:
            token = await asyncio.to_thread(self._token) if self._fixed and self._weights_hash else None
            said = await self._wire.health(replica.url, HEALTH_TIMEOUT_S, token)
        except TimeoutError:
            problem = f"{replica.url} does not answer (nothing within {HEALTH_TIMEOUT_S:g} s)"
        except Broken as error:
            problem = f"{replica.url} does not answer ({error})"
        else:
            nonce, weights = said.get("nonce"), said.get("weights_hash")
            if not nonce or (replica.nonce and nonce != replica.nonce):
                problem = f"what answers at {replica.url} is not the server that was published there"
            elif said.get("status") == "draining":
                problem = f"{replica.url} is leaving"
            elif self._fixed and self._weights_hash and weights != self._weights_hash:
                problem = f"{replica.url} serves the weights {weights}, not {self._weights_hash}"
            else:
                replica.circuit.proved()
                return True
        replica.circuit.silent()
        self.trouble(problem)
        return False

    def _tend(self) -> list[asyncio.Task[None] | asyncio.Task[bool]]:
        """Begin what is due: reading the folder, asking replicas who they are. What is under way.

        Both go on aside, so that a record left behind by a dead host costs no call its time-out.
        """
        under_way: list[asyncio.Task[None] | asyncio.Task[bool]] = []
        every_s = REFRESH_SOON_S if self._in_trouble else REFRESH_S
        if not self._fixed and not _is_running(self._reading) and time.monotonic() - self._read_at >= every_s:
            self._reading = asyncio.create_task(self._read())
        for replica in self._known.values():
            if replica.circuit.state() == "half-open" and not _is_running(replica.proof):
                replica.proof = asyncio.create_task(self.prove(replica))
            if replica.proof is not None and not replica.proof.done():
                under_way.append(replica.proof)
        if self._reading is not None and not self._reading.done():
            under_way.append(self._reading)
        return under_way

    async def _read(self) -> None:
        self._read_at, self._in_trouble = time.monotonic(), False
        refused: list[str] = []
        try:
            records = await asyncio.to_thread(handoff.discover, self._folder, refused.append)
        except OSError as error:
            self.trouble(f"{self._folder} cannot be read: {error}")
            return
        for problem in set(refused) - self._told:
            log.warning("left out: %s", problem)
        self._told |= set(refused)
        fitting = [record for record in records if self._weights_hash in ("", record.weights_hash)]
        self._known = {
            r.nonce: self._known.get(r.nonce) or Replica(r.url, r.nonce, Circuit(self._rng), r.weights_hash)
            for r in fitting
        }
        if not fitting:
            self.trouble(self._why_none(records))
        elif self._none_fits:
            self.problem = self._silence
        self._none_fits = not fitting

    def _why_none(self, records: list[Endpoint]) -> str:
        if not records:
            return f"no server is published in {self._folder}"
        others = ", ".join(sorted({record.weights_hash for record in records}))
        return f"no server in {self._folder} serves the weights {self._weights_hash}; published are {others}"


def _is_running(task: asyncio.Task[None] | asyncio.Task[bool] | None) -> bool:
    return task is not None and not task.done()
