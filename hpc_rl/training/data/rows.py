"""A round's data in two files on the node's own disk, which all ranks of the node read.

Data come as one compressed parquet file per shard, on shared storage: thousands of files to open, and more memory than
a rank should take if all of them are kept. So they are read once per node, checked, and written to the node's own disk:
`rows.arrow`, chunks of rows that are read one at a time, and `index.npy`, a row of numbers for each unit of data, which
the ranks map into memory and so share. Once all ranks have opened them the files lose their names: whatever ends the
job, they are gone with it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hpc_rl.training.data.units import INDEX, id_hashes
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.ranks.distributed import barrier
from hpc_rl.training.ranks.nodes import once_per_node

log = logging.getLogger(__name__)

U = TypeVar("U")
W = TypeVar("W")

CHUNK = 16
"""Rows that are read together. Those of a group lie side by side."""
CHUNKS_IN_MEMORY = 32
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def once(rank: int, write: Callable[[Path], W], open: Callable[[W], U]) -> U:
    """Write files on the first rank of each node, and open them on all. All ranks must call it.

    Parameters
    ----------
    write
        Gets an empty folder on the node's disk; what it returns goes to the node's other ranks.
    open
        Opens its files; they may be removed afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="hpc_rl-data-") as folder:
        written = once_per_node(rank, lambda: write(Path(folder)))
        opened = open(written)
        barrier()  # who has opened the files needs their names no more
    return opened


@dataclass(frozen=True)
class Written:
    """Where the files are: what one rank of a node tells the others. `digest` and `left_out` as those of `Units`."""

    folder: Path
    digest: str
    left_out: Mapping[str, int]


class Writer:
    """Takes rows of one file after the other; keeps of each what the index says, and the hash of its id.

    Parameters
    ----------
    folder
        Empty, on a disk with room for all tokens: 4 bytes for each, as much for a log-probability. Compression spares
        what repeats.
    id
        The column that names rows; no name may be there twice.
    schema
        Of the rows that are written.
    more
        What the index has besides `INDEX`.
    """

    def __init__(self, folder: Path, id: str, schema: pa.Schema, more: Sequence[Any] = ()) -> None:
        self.folder, self._id, self._schema = folder, id, schema
        self.dtype = np.dtype([*INDEX, *more])
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._file = pa.ipc.new_file(folder / "rows.arrow", schema, options=options)
        self._chunks, self._digest = 0, hashlib.sha256()
        self._files: list[tuple[Path, int]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._kept: list[NDArray[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def read(self) -> int:
        """Rows that were read so far."""
        return sum(rows for _, rows in self._files)

    def add(self, file: Path, ids: Sequence[str], keep: NDArray[np.bool_], rows: pa.RecordBatch) -> NDArray[Any]:
        """Write some rows of a file.

        Parameters
        ----------
        ids
            (n,) what they are called.
        keep
            (n,) which of them are kept; the others are known by name only.
        rows
            Those that are kept.

        Returns
        -------
        Their part of the index; what is in it besides the hashes and places is the caller's to fill in.
        """
        found = id_hashes(ids)
        self._hashes.append(found)
        if self._files and self._files[-1][0] == file:
            self._files[-1] = file, self._files[-1][1] + len(ids)
        else:
            self._files.append((file, len(ids)))
        index = np.zeros(len(rows), self.dtype)
        index["id_hash"] = found[keep]
        index["chunk"], index["row"] = self._chunks + np.arange(len(rows)) // CHUNK, np.arange(len(rows)) % CHUNK
        self._kept.append(index)
        self._digest.update(index["id_hash"].tobytes())
        rows = rows.select(self._schema.names).cast(self._schema)
        for column in rows.columns:
            if pa.types.is_list(column.type):
                self._digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        for start in range(0, len(rows), CHUNK):
            self._file.write_batch(rows.slice(start, CHUNK))
            self._chunks += 1
        return index

    def index(self) -> NDArray[Any]:
        """(N,) of `dtype`: all rows that were kept, in the order in which they came.

        Raises
        ------
        UnusableData
            When a name was there twice, also one of a row that was not kept.
        """
        self._check_ids()
        return np.concatenate([np.empty(0, self.dtype), *self._kept])

    def save(self, index: NDArray[Any], left_out: Mapping[str, int]) -> Written:
        """Write the index that readers will have."""
        file = BytesIO()
        np.save(file, index)
        (self.folder / "index.npy").write_bytes(file.getbuffer())  # np.save's error does not say that a disk is full
        for name in index.dtype.names or ():
            if name not in ("chunk", "row"):
                self._digest.update(index[name].tobytes())
        return Written(self.folder, self._digest.hexdigest(), left_out)

    def _check_ids(self) -> None:
        found = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        order = np.argsort(found, kind="stable")
        same = np.flatnonzero(found[order][1:] == found[order][:-1])
        ends = np.cumsum([rows for _, rows in self._files])
        for first, second in zip(order[same], order[same + 1], strict=True):
            (_, id), (file, other) = (self._name(int(place), ends) for place in (first, second))
            if id == other:  # and not only their hashes
                raise UnusableData(f"{self._id} {id} is there twice, the second time in {file}")

    def _name(self, place: int, ends: NDArray[np.int64]) -> tuple[Path, str]:
        number = int(np.searchsorted(ends, place, side="right"))
        file, rows = self._files[number]
        row = place - int(ends[number]) + rows
        return file, pq.read_table(file, columns=[self._id])[self._id][row].as_py()


@contextmanager
def room(folder: Path, what: str) -> Iterator[None]:
    """Around all writing: a full disk is an error that says what to do; how much was written is in the log.

    Raises
    ------
    OSError
        When the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        message = (
            f"no room for the round's {what} in {folder}, of which {_bytes(folder) / 1e6:.0f} MB are there; a token "
            "takes 4 bytes, and 4 more with its log-probability. Set TMPDIR to a folder on a disk with room"
        )
        raise OSError(errno.ENOSPC, message) from error
    log.info("the round's %s are in %s: %.1f MB", what, folder, _bytes(folder) / 1e6)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


class Row:
    """One row of `rows.arrow`."""

    def __init__(self, chunk: pa.RecordBatch, number: int) -> None:
        self._chunk, self._number = chunk, number

    def __getitem__(self, column: str) -> Any:
        return self._chunk[column][self._number].as_py()

    def get(self, column: str, otherwise: Any) -> Any:
        """A value, where there is such a column."""
        return self[column] if column in self._chunk.schema.names else otherwise

    def array(self, column: str) -> NDArray[Any]:
        """A list as an array of its own."""
        found: NDArray[Any] = self._chunk[column][self._number].values.to_numpy(zero_copy_only=False).copy()
        return found


class Chunks:
    """Reads rows that `Writer` wrote. The chunks read last stay in memory: a group is in one or two of them."""

    def __init__(self, folder: Path) -> None:
        # Read, not mapped: what is mapped counts as a process's memory once it was touched, and an epoch touches all.
        self._file = pa.ipc.open_file(pa.OSFile(str(folder / "rows.arrow")))
        self._kept: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def __call__(self, place: Any) -> Row:
        """The row that a row of the index stands for."""
        return Row(self._chunk(int(place["chunk"])), int(place["row"]))

    def _chunk(self, number: int) -> pa.RecordBatch:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        found = self._kept[number] = self._file.get_batch(number)
        if len(self._kept) > CHUNKS_IN_MEMORY:
            self._kept.popitem(last=False)
        return found


def open_index(folder: Path) -> NDArray[Any]:
    """The index that `Writer.save` wrote, mapped into memory."""
    found: NDArray[Any] = np.load(folder / "index.npy", mmap_mode="r")
    return found
