"""The servers of a service as a client sees them: who is published, who really answers, who is least busy.

A record in the handoff folder is believed only after the server at its address has repeated the record's nonce: a port
of a server that died may belong to somebody else by now. The token is never sent before that.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from hpc_rl.services import handoff

log = logging.getLogger(__name__)

REFRESH_S = 10.0
HEALTH_TIMEOUT_S = 5.0
FIRST_REST_S = 0.5
LONGEST_REST_S = 15.0


@dataclass(eq=False)
class Replica:
    """One server. `nonce` is empty where the user gave the URL; then any server there will do."""

    url: str
    nonce: str
    verified: bool = False
    outstanding: int = 0
    failures: int = 0
    rests_until: float = 0.0


class Replicas:
    """All servers of one service, looked up in the handoff folder again and again.

    Parameters
    ----------
    folder
        The service's handoff folder.
    url
        Base URL of one server to use instead; null = those in the folder.
    http
        Connections to use.
    rng
        Breaks ties between replicas that are equally busy.
    """

    def __init__(self, folder: Path, url: str | None, http: httpx.Client, rng: random.Random) -> None:
        self._folder, self._http, self._rng, self._fixed = folder, http, rng, url is not None
        self._lock = threading.Lock()
        self._known: dict[str, Replica] = {url: Replica(url, "")} if url else {}
        self._read_at = float("-inf")
        self._checking: threading.Thread | None = None
        self.problem = f"no server is published in {folder}"

    @contextmanager
    def least_busy(self) -> Iterator[Replica | None]:
        """The verified replica with the fewest calls under way, for one call more; None when there is none."""
        replica = self._pick()
        try:
            yield replica
        finally:
            if replica is not None:
                with self._lock:
                    replica.outstanding -= 1

    def succeeded(self, replica: Replica) -> None:
        """A call was answered."""
        replica.failures = 0

    def failed(self, replica: Replica, problem: str) -> None:
        """A call was answered with a failure or not in time: others come first, and it must say again who it is."""
        with self._lock:
            self.problem = problem
            replica.verified = False
            self._read_at = float("-inf")

    def gone(self, replica: Replica, problem: str) -> None:
        """It does not answer at all: it gets a rest, twice as long each time."""
        with self._lock:
            replica.failures += 1
            rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** (replica.failures - 1))
            replica.rests_until = time.monotonic() + rest_s
        self.failed(replica, problem)

    def busy(self, replica: Replica, problem: str, rest_s: float) -> None:
        """It asked to be left alone for so long (Retry-After). Seconds."""
        with self._lock:
            self.problem = problem
            replica.rests_until = time.monotonic() + rest_s
            self._read_at = float("-inf")

    def _pick(self) -> Replica | None:
        while True:
            with self._lock:
                self._refresh()
                now = time.monotonic()
                awake = [replica for replica in self._known.values() if replica.rests_until <= now]
                if not awake:
                    return None
                chosen = min(awake, key=lambda r: (not r.verified, r.outstanding, self._rng.random()))
                chosen.outstanding += 1
                if chosen.verified:
                    self._verify_others([replica for replica in awake if not replica.verified])
            if chosen.verified or self._verify(chosen):
                return chosen
            with self._lock:
                chosen.outstanding -= 1

    def _refresh(self) -> None:
        fresh = time.monotonic() - self._read_at < REFRESH_S
        if self._fixed or (fresh and any(replica.verified for replica in self._known.values())):
            return
        self._read_at = time.monotonic()
        records = handoff.discover(self._folder, lambda problem: log.warning("left out: %s", problem))
        self._known = {r.nonce: self._known.get(r.nonce) or Replica(r.url, r.nonce) for r in records}
        if not self._known:
            self.problem = f"no server is published in {self._folder}"

    def _verify_others(self, replicas: list[Replica]) -> None:
        """Look at new and recovered servers aside: a record left behind by a dead host costs no call its time-out."""
        if replicas and not (self._checking and self._checking.is_alive()):
            self._checking = threading.Thread(target=lambda: [self._verify(r) for r in replicas], daemon=True)
            self._checking.start()

    def _verify(self, replica: Replica) -> bool:
        """Ask the server at the replica's address who it is; without the token, which it has yet to earn."""
        try:
            answer = self._http.get(f"{replica.url}/health", timeout=HEALTH_TIMEOUT_S)
            said = answer.json() if answer.status_code == 200 else {}
        except (httpx.HTTPError, ValueError) as error:
            self.gone(replica, f"{replica.url} does not answer ({type(error).__name__}: {error})")
            return False
        nonce = said.get("nonce") if isinstance(said, dict) else None
        if nonce is None or (replica.nonce and nonce != replica.nonce):
            self.gone(replica, f"what answers at {replica.url} is not the server that was published there")
            return False
        replica.verified = True
        return True
