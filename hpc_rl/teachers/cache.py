"""Answers that were paid for, on disk, by the content of what was asked.

A folder of append-only JSONL segments, one for each process that stores anything. A segment has one writer, so nothing
is locked (sqlite's locks mean little on NFS and Lustre); a hundred thousand answers are a handful of files. Each line
is written by one write(2) at the end of the file: a writer that is killed leaves at most one torn last line, which
readers skip. Lines reach the disk within seconds; what a crash of the machine loses is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_rl.run import atomic
from hpc_rl.services.trust import make_folder, open_own

SUFFIX = ".jsonl"
SYNC_S = 5.0
HASH_CHARACTERS = 64
_HEAD = '{"key":"'


@dataclass(frozen=True)
class Answer:
    """What a teacher said, as it came.

    Attributes
    ----------
    text
        The message's content; "" where there was none.
    finish_reason
        `stop`, `length` (cut off), `content_filter` …
    prompt_tokens, completion_tokens
        What the endpoint counted.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def key_of(body: Mapping[str, Any], weights_hash: str = "") -> str:
    """SHA-256 of what is sent: model, messages, sampling, schema; and of the model's weights where they are known.

    Neither the endpoint nor its key counts.
    """
    asked = {**body, "weights_hash": weights_hash} if weights_hash else body
    canonical = json.dumps(asked, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()


@dataclass
class _Segment:
    path: Path
    read_to: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    segment: int
    offset: int
    length: int


class Cache:
    """Answers by the key of what was asked. For one thread.

    Parameters
    ----------
    folder
        Is made, closed to other users' writing. Files in it that belong to another user are not believed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segments: list[_Segment] = []
        self._places: dict[bytes, _Place] = {}
        self._own: int | None = None
        self._synced = 0.0
        make_folder(folder)
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Learn what other processes have stored since.

        Raises
        ------
        Untrusted
            When a segment is another user's.
        """
        known = {segment.path.name for segment in self._segments}
        for name in sorted(os.listdir(self._folder)):
            if name.endswith(SUFFIX) and not name.startswith(".") and name not in known:
                self._segments.append(_Segment(self._folder / name))
        for number in range(len(self._segments)):
            self._read(number)

    def get(self, key: str) -> Answer | None:
        """The answer to what has this key, or None. A line that is damaged is no answer."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        try:
            with open_own(self._segments[place.segment].path) as file:
                file.seek(place.offset)
                line = file.read(place.length)
            found = json.loads(line)
            if found["key"] == key:
                return Answer(**found["answer"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # Untrusted is a ValueError
        del self._places[bytes.fromhex(key)]
        return None

    def put(self, key: str, answer: Answer) -> None:
        """Store an answer, for good.

        Raises
        ------
        OSError
            When it cannot be written: an answer that is paid for and not kept would be paid for again.
        """
        line = json.dumps({"key": key, "answer": asdict(answer)}, separators=(",", ":")).encode() + b"\n"
        segment, descriptor = self._own_segment()
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(f"{segment.path}: {written} of {len(line)} bytes could be written; is the disk full?")
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(descriptor)
                self._synced = time.monotonic()
        except OSError:
            self.close()  # this segment may end in a torn line now, and takes no more
            raise
        self._places[bytes.fromhex(key)] = _Place(self._segments.index(segment), segment.read_to, len(line))
        segment.read_to += len(line)

    def close(self) -> None:
        """Bring everything to the disk. The cache may be used on."""
        if self._own is not None:
            descriptor, self._own = self._own, None
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _own_segment(self) -> tuple[_Segment, int]:
        if self._own is None:
            path = self._folder / f"{time.time_ns():x}-{secrets.token_hex(4)}{SUFFIX}"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
            self._own = os.open(path, flags, 0o600)
            atomic.fsync_folder(self._folder)
            self._current = _Segment(path)
            self._segments.append(self._current)
        return self._current, self._own

    def _read(self, number: int) -> None:
        """Index the whole lines that a segment has got since it was last read."""
        segment = self._segments[number]
        if not segment.path.exists() or segment.path.stat().st_size <= segment.read_to:
            return
        with open_own(segment.path) as file:
            file.seek(segment.read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                key = line[len(_HEAD) : len(_HEAD) + HASH_CHARACTERS]
                if line.startswith(_HEAD.encode()):
                    with suppress(ValueError):  # no line of ours
                        self._places[bytes.fromhex(key.decode())] = _Place(number, segment.read_to, len(line))
                segment.read_to += len(line)
