"""Messages between a pool and a worker over a private socket pair. Neither side ever waits for the other to read."""

from __future__ import annotations

import pickle
import select
import socket
import struct
import time
from collections.abc import Iterable
from typing import Any

_HEAD = struct.Struct("!Q")
_CHUNK_BYTES = 1 << 20


def wait(readers: Iterable[int], writers: Iterable[int], timeout_s: float | None) -> set[int]:
    """Those of these file descriptors that can be read, have ended, or can be written to; waits for one if need be."""
    events = dict.fromkeys(readers, select.POLLIN)
    for writer in writers:
        events[writer] = events.get(writer, 0) | select.POLLOUT
    poll = select.poll()  # not select.select: a process with many files has numbers above its limit
    for number, event in events.items():
        poll.register(number, event)
    return {number for number, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}


class Channel:
    """One end of a socket pair; what does not fit into the socket yet is kept here.

    Messages are pickled: both ends are one program, and nobody else can reach the socket.

    Attributes
    ----------
    ended
        The other end is closed, or its process is gone. What it had sent before can still be received.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._unsent = bytearray()
        self._received = bytearray()
        self.ended = False

    def fileno(self) -> int:
        """For `select`."""
        return self._sock.fileno()

    @property
    def unsent_bytes(self) -> int:
        """What waits here for the other side to read; nothing once that has ended."""
        return 0 if self.ended else len(self._unsent)

    def send(self, *message: Any) -> None:
        """Send a message, or keep it for `flush`; never waits."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._unsent += _HEAD.pack(len(data))
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send on what was kept, as far as the other side has room."""
        while self.unsent_bytes:
            try:
                with memoryview(self._unsent) as whole, whole[:_CHUNK_BYTES] as part:
                    sent = self._sock.send(part)
            except BlockingIOError:
                return
            except OSError:  # nobody reads any more: the end of what was received says so too
                self._unsent.clear()
                return
            del self._unsent[:sent]

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything is sent, or the time is up; whether it is."""
        deadline = time.monotonic() + timeout_s
        while self.unsent_bytes and (left_s := deadline - time.monotonic()) > 0:
            wait([], [self.fileno()], left_s)
            self.flush()
        return not self.unsent_bytes

    def receive(self) -> list[tuple[Any, ...]]:
        """All whole messages that have come; sets `ended` at the end of them."""
        while not self.ended:
            try:
                data = self._sock.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.ended = not data
            self._received += data
        messages = []
        while len(self._received) >= _HEAD.size:
            (length,) = _HEAD.unpack_from(self._received)
            end = _HEAD.size + length
            if len(self._received) < end:
                break
            messages.append(pickle.loads(bytes(self._received[_HEAD.size : end])))
            del self._received[:end]
        return messages

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until something can be received, sending on what was kept meanwhile."""
        wait([self.fileno()], [self.fileno()] if self.unsent_bytes else [], timeout_s)
        self.flush()

    def close(self) -> None:
        """Close this end."""
        self.ended = True
        self._sock.close()
