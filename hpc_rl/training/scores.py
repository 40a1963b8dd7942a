"""Numbers by unit in plain files: an index and the values, a pair of such files for each rank that computed some.

A rank appends what it has computed, values before their row of the index, so a kill at any moment leaves rows that can
be trusted and at most a tail that is cut off. Nothing is pickled.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hpc_rl.training.data.units import id_hashes
from hpc_rl.training.errors import UnusableData

ROW = np.dtype([("id_hash", "<u8"), ("batch", "<i4"), ("length", "<i4")])
"""Of the index: which unit, in which batch it was scored, how many values it has."""
VALUE = np.dtype("<f4")
INDEX, VALUES = ".index", ".values"
OPEN_FILES = 64


class Part:
    """What one rank has computed, batch by batch.

    Parameters
    ----------
    folder, name
        Where its two files go; the folder is made.
    previous
        Folders of the same computation that was broken off. The one in which this rank came furthest is continued.

    Attributes
    ----------
    batches
        How many are done.
    """

    def __init__(self, folder: Path, name: str, previous: Sequence[Path] = ()) -> None:
        self._folder, self._name = folder, name
        self._pending: list[tuple[NDArray[Any], NDArray[np.float32]]] = []
        folder.mkdir(parents=True, exist_ok=True)
        best = max(previous, key=lambda one: len(_whole(one, name)), default=None)
        if best is not None and best != folder:
            for ending in (INDEX, VALUES):
                shutil.copyfile(best / (name + ending), folder / (name + ending))
        rows = _whole(folder, name)
        # The last batch may have been written in part. A batch that has only a filler has no row, and is done again.
        self.batches = int(rows["batch"].max(initial=0))

    def begin(self, batches: int) -> None:
        """Go on after so many batches, which must be done; what is there of later ones is thrown away."""
        assert batches <= self.batches
        rows = _whole(self._folder, self._name)
        rows = rows[rows["batch"] < batches]
        for ending, size in ((INDEX, rows.nbytes), (VALUES, int(rows["length"].sum()) * VALUE.itemsize)):
            with (self._folder / (self._name + ending)).open("ab") as file:
                file.truncate(size)

    def add(self, batch: int, ids: Sequence[str], values: Sequence[NDArray[np.float32]]) -> None:
        """The values of the units of a batch; they are not safe before `flush`.

        Raises
        ------
        UnusableData
            When one is no number.
        """
        for id, numbers in zip(ids, values, strict=True):
            if not np.isfinite(numbers).all():
                raise UnusableData(f"{id}: a model gives it a log-probability that is no number, see its tokens")
        rows = np.zeros(len(ids), ROW)
        rows["id_hash"], rows["batch"], rows["length"] = id_hashes(ids), batch, [len(numbers) for numbers in values]
        self._pending.append((rows, np.concatenate(values)))

    def flush(self) -> None:
        """Force what was added to disk.

        Raises
        ------
        OSError
            When there is no room.
        """
        if not self._pending:
            return
        rows, values = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        try:
            _append(self._folder / (self._name + VALUES), values.astype(VALUE))
            _append(self._folder / (self._name + INDEX), rows)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            what = f"no room for log-probabilities in {self._folder}: they take 4 bytes a token, 16 a unit. What is "
            raise OSError(errno.ENOSPC, what + "there is gone on with: make room and launch again") from error


class Scores:
    """The values of all units in a folder of parts; those of a unit are read when they are asked for.

    Parameters
    ----------
    folder
        Complete: nobody writes to it any more.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [path.with_suffix(VALUES) for path in sorted(folder.glob(f"*{INDEX}"))]
        parts = [_whole(folder, path.stem) for path in self._files]
        rows = np.concatenate([np.empty(0, ROW), *parts])
        ends = [np.cumsum(part["length"], dtype=np.int64) for part in parts]
        starts = [end - part["length"] for end, part in zip(ends, parts, strict=True)]
        order = np.argsort(rows["id_hash"], kind="stable")
        self._hashes, self._lengths = rows["id_hash"][order], rows["length"][order]
        self._starts = np.concatenate([np.empty(0, np.int64), *starts])[order]
        self._part = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]
        self._open = lru_cache(OPEN_FILES)(lambda number: self._files[number].open("rb"))

    def missing(self, units: Any) -> NDArray[np.int64]:
        """Numbers of the units that have no values here."""
        found: NDArray[np.int64] = np.flatnonzero(~np.isin(units.index["id_hash"], self._hashes))
        return found

    def rows(self, ids: Sequence[str]) -> list[NDArray[np.float32]]:
        """The values of each unit."""
        return [self._read(place) for place in self._places(id_hashes(ids))]

    def table(self, units: Any) -> NDArray[np.float32]:
        """(N, k) values of all units, where each has k."""
        return np.stack([self._read(place) for place in self._places(units.index["id_hash"])])

    def sums(self, units: Any) -> NDArray[np.float64]:
        """(N,) sum of the values of each unit."""
        places = self._places(units.index["id_hash"])
        return np.array([self._read(place).sum(dtype=np.float64) for place in places], np.float64)

    def _places(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        places = np.searchsorted(self._hashes, hashes)
        assert (self._hashes[np.minimum(places, len(self._hashes) - 1)] == hashes).all(), "they are complete"
        return places

    def _read(self, place: int) -> NDArray[np.float32]:
        file: BinaryIO = self._open(int(self._part[place]))
        size = int(self._lengths[place]) * VALUE.itemsize
        found = os.pread(file.fileno(), size, int(self._starts[place]) * VALUE.itemsize)
        assert len(found) == size, f"{file.name} has become shorter"
        return np.frombuffer(found, VALUE)


def _whole(folder: Path, name: str) -> NDArray[Any]:
    """Rows of an index whose values are all there."""
    index, values = folder / (name + INDEX), folder / (name + VALUES)
    if not (index.is_file() and values.is_file()):
        return np.empty(0, ROW)
    rows = np.fromfile(index, ROW)  # a torn row at the end is no row
    written = np.cumsum(rows["length"], dtype=np.int64) * VALUE.itemsize <= values.stat().st_size
    return rows[written]


def _append(path: Path, array: NDArray[Any]) -> None:
    with path.open("ab") as file:
        file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
