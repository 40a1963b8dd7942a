"""Bytes to a server and bytes back: what no HTTP library would send."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterable

from tests.waiting import PATIENCE_S


def talk(port: int, parts: bytes | Iterable[bytes], *, pause_s: float = 0.0) -> bytes:
    """Send these parts, with a pause after each, for as long as the server listens; all that it says until it closes.

    TimeoutError when it does not close within `PATIENCE_S` of its last byte.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in [parts] if isinstance(parts, bytes) else parts:
                sock.sendall(part)
                if pause_s:
                    time.sleep(pause_s)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while received := sock.recv(65536):
                said += received
        return said


def head(method: str, target: str, port: int, *lines: str, host: str | None = None) -> bytes:
    """A request's head. `Connection: close` is part of it."""
    first = [f"{method} {target} HTTP/1.1", f"Host: {host or f'127.0.0.1:{port}'}", "Connection: close"]
    return "\r\n".join([*first, *lines, "", ""]).encode("latin-1")


def statuses(said: bytes) -> list[int]:
    """The status of each answer in what a server said."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]
