"""Who is next, and when: requests of many clients wait in one bounded queue, in which the clients take turns.

Each client has a line of its own: who has three items does not wait for who has three thousand.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

TURN_ITEMS = 8
"""Fewest items that a client's turn has: neighbours in a request often share work, an image for example."""
PACE_MEMORY = 0.8
"""Weight of what was before, when a batch ends."""
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0


@dataclass(eq=False)
class Waiting(Generic[Item]):
    """A request in the queue: `items[taken:]` wait."""

    client: str
    items: Sequence[Item]
    taken: int = 0

    @property
    def left(self) -> int:
        """Items that wait."""
        return len(self.items) - self.taken


Request = TypeVar("Request", bound=Waiting)  # type: ignore[type-arg]


@dataclass(frozen=True)
class Piece(Generic[Request]):
    """Items [start:stop] of a request, in a batch."""

    request: Request
    start: int
    stop: int


@dataclass
class _Line(Generic[Request]):
    """Requests of one client, in order; `turn` items of its turn are left."""

    requests: deque[Request] = field(default_factory=deque)
    waiting: int = 0
    turn: int = 0


class FairQueue(Generic[Request]):
    """Requests that wait, in a line for each client. Not for several threads: the owner has a lock.

    Parameters
    ----------
    max_items
        Items that may wait in all.
    max_client_items
        Items of one client that may wait.
    """

    def __init__(self, max_items: int, max_client_items: int) -> None:
        self._max_items, self._max_client_items = max_items, max_client_items
        self._lines: OrderedDict[str, _Line[Request]] = OrderedDict()  # of clients that wait, whose turn it is first
        self.items = 0

    @property
    def clients(self) -> int:
        """How many clients wait."""
        return len(self._lines)

    def of(self, client: str) -> int:
        """Items of one client that wait."""
        return self._lines[client].waiting if client in self._lines else 0

    def excess(self, items: int) -> int:
        """How many have to leave before so many more have room; below 1 where they have."""
        return self.items + items - self._max_items

    def client_excess(self, client: str, items: int) -> int:
        """How many of this client's have to leave before so many more of its own have room; below 1 where they have."""
        return self.of(client) + items - self._max_client_items

    def add(self, request: Request) -> None:
        """Put a request at the end of its client's line; a client that did not wait gets the last turn."""
        line = self._lines.setdefault(request.client, _Line())
        line.requests.append(request)
        line.waiting += request.left
        self.items += request.left

    def drop(self, request: Request) -> None:
        """Forget what still waits of a request."""
        line = self._lines.get(request.client)
        if line is None or request not in line.requests:
            return
        line.requests.remove(request)
        line.waiting -= request.left
        self.items -= request.left
        if not line.requests:
            del self._lines[request.client]

    def take(self, count: int) -> list[Piece[Request]]:
        """The next `count` items, or all: an even share for each client, or what is left of a turn.

        A turn that the end of a batch cuts short goes on in the next.
        """
        batch: list[Piece[Request]] = []
        share = max(min(TURN_ITEMS, count), count // max(1, self.clients))
        while count and self._lines:
            client, line = next(iter(self._lines.items()))
            line.turn = line.turn or share
            request = line.requests[0]
            taken = min(count, line.turn, request.left)
            batch.append(Piece(request, request.taken, request.taken + taken))
            request.taken += taken
            line.turn -= taken
            line.waiting -= taken
            self.items -= taken
            count -= taken
            if not request.left:
                line.requests.popleft()
            if not line.requests:
                del self._lines[client]
            elif not line.turn:
                self._lines.move_to_end(client)
        return batch


@dataclass
class Pace:
    """How fast a model was lately: sums over the last batches, the older the less."""

    items: float = 0.0
    seconds: float = 0.0

    def took(self, items: int, seconds: float) -> None:
        """A batch has ended."""
        self.items = PACE_MEMORY * self.items + items
        self.seconds = PACE_MEMORY * self.seconds + seconds

    def seconds_for(self, items: float) -> float:
        """How long so many items take, between 1 and 60 seconds."""
        expected_s = items * self.seconds / self.items if self.items else 0.0
        return min(MOST_RETRY_S, max(LEAST_RETRY_S, expected_s))
