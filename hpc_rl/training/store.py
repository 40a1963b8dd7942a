"""A round's graded samples in two files on the node's own disk, which all ranks of the node read.

Graded samples come as one compressed parquet file per shard, on shared storage: thousands of files to open, and more
memory than a rank should take if all of them are kept. So they are read once per node, checked, and written to the
node's own disk: `samples.arrow`, chunks of samples that are read one at a time, and `index.npy`, a row of numbers for
each sample, which the ranks map into memory and so share. Once all ranks have opened them the files lose their names:
whatever ends the job, they are gone with it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hpc_rl.training.distributed import barrier
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.nodes import once_per_node
from hpc_rl.training.rollouts import Counts, Rollout, Rollouts, have_equal_rewards, index_dtype

log = logging.getLogger(__name__)

CHUNK = 16
"""Samples that are read together. Those of a group lie side by side."""

CHUNKS_IN_MEMORY = 32
READ_AT_ONCE = 1024
"""Rows of a parquet file in memory while it is read."""

TOKENS = ("prompt_token_ids", "token_ids", "logprobs")
KEPT = ("sample_id", "row_id", *TOKENS)
READ = (*KEPT, "reward", "group", "role", "attempt", "finish_reason", "weights_hash", "left_out")


@dataclass(frozen=True)
class Written:
    """Where the files are, and what is in them: what one rank of a node tells the others."""

    folder: Path
    roles: tuple[str, ...]
    parts: tuple[str, ...]
    counts: Counts
    weights_hash: str


def read(files: Iterable[Path], parts: Sequence[str], group_size: int, groups: int, rank: int = 0) -> Rollouts:
    """The rollouts of a round. All ranks must call it; only the first rank of each node goes through `files`.

    Parameters and errors as those of `write`.
    """
    with tempfile.TemporaryDirectory(prefix="hpc_rl-rollouts-") as folder:
        written = once_per_node(rank, lambda: write(files, Path(folder), parts, group_size, groups))
        rollouts = open_rollouts(written)
        barrier()  # who has opened the files needs their names no more
    return rollouts


def write(files: Iterable[Path], folder: Path, parts: Sequence[str], group_size: int, groups: int) -> Written:
    """Read the graded parquet files of a round once, check them, and write the files that `open_rollouts` opens.

    Parameters
    ----------
    files
        One per shard.
    folder
        Empty, on a disk with room for all tokens: 8 bytes for each that was sampled and its log-probability, 4 for each
        of a prompt. Compression spares what repeats: prompts of the same group.
    parts
        Parts of the reward: a column `reward_PART` for each.
    group_size
        G: how many samples each role was to have of each prompt.
    groups
        How many groups the round has: prompts × roles. One that no completion was accepted for is in no file, and
        dropped.

    Raises
    ------
    UnusableData
        When a sample is there twice, was drawn with other weights than the rest, or is damaged; when no group is left.
    OSError
        When the disk is full.
    """
    try:
        with _Writer(folder / "samples.arrow", parts) as writer:
            for file in files:
                writer.add(file)
        writer.check_ids()
        index, counts = writer.index(group_size, groups)
        np.save(folder / "index.npy", index)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            written = sum(path.stat().st_size for path in folder.iterdir())
            what = (
                f"no room for the round's samples in {folder}, of which {written / 1e6:.0f} MB are there; each takes 8 "
                "bytes a sampled token, 4 a token of its prompt. Set TMPDIR to a folder on a disk with room"
            )
            raise OSError(errno.ENOSPC, what) from error
        raise
    weights = writer.weights_hash()
    size = sum(path.stat().st_size for path in folder.iterdir())
    log.info("%d samples are in %s: %.1f MB", counts.samples, folder, size / 1e6)
    return Written(folder, writer.roles, tuple(parts), counts, weights)


def open_rollouts(written: Written) -> Rollouts:
    """The rollouts in files that a process of this node wrote; they may be removed afterwards."""
    index: NDArray[Any] = np.load(written.folder / "index.npy", mmap_mode="r")
    rows = _Chunks(written.folder / "samples.arrow", written.roles, written.parts)
    starts = _bounds(index)
    return Rollouts(index, written.roles, written.parts, starts, rows, written.counts, written.weights_hash)


def _bounds(index: NDArray[Any]) -> NDArray[np.int64]:
    """(G + 1,) where each group, a prompt and a role, starts in an ordered index, and its length."""
    groups, roles = index["group"], index["role"]
    starts = np.flatnonzero((groups[1:] != groups[:-1]) | (roles[1:] != roles[:-1])) + 1
    return np.concatenate(([0], starts, [len(index)])) if len(index) else np.zeros(1, np.int64)


class _Writer:
    """Takes one parquet file after the other; keeps of each sample what the index says, and the hash of its id."""

    def __init__(self, path: Path, parts: Sequence[str]) -> None:
        self._dtype = index_dtype(parts)
        self._rewards = ("reward", *(f"reward_{part}" for part in parts))
        fields = [(name, pa.list_(pa.float32() if name == "logprobs" else pa.int32())) for name in TOKENS]
        schema = pa.schema([("sample_id", pa.string()), ("row_id", pa.string()), *fields])
        self._file = pa.ipc.new_file(path, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        self._schema, self._chunks = schema, 0
        self._files: list[Path] = []
        self._rows: list[int] = []
        self._ids: list[NDArray[np.uint64]] = []
        self._used: list[NDArray[Any]] = []
        self._weights: set[str] = set()
        self._roles: dict[str, int] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, file: Path) -> None:
        """Read one file."""
        rows = 0
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(READ_AT_ONCE, columns=[*READ, *self._rewards[1:]], use_threads=False):
                self._add(batch, file)
                rows += len(batch)
        self._files.append(file)
        self._rows.append(rows)

    def _add(self, batch: pa.RecordBatch, file: Path) -> None:
        hashes = np.frombuffer(
            b"".join(hashlib.blake2b(id.encode(), digest_size=8).digest() for id in batch["sample_id"].to_pylist()),
            np.uint64,
        )
        self._ids.append(hashes)
        self._weights.update(pc.unique(batch["weights_hash"]).to_pylist())
        graded = pc.invert(batch["left_out"])
        used, hashes = batch.filter(graded), hashes[graded.to_numpy(zero_copy_only=False)]
        lengths = {name: pc.list_value_length(used[name]).to_numpy() for name in TOKENS}
        _check(used, lengths, file)
        rows = np.zeros(len(used), self._dtype)
        for name in ("group", "attempt", *self._rewards):
            rows[name] = used[name].to_numpy(zero_copy_only=False)
        rows["role"] = [self._roles.setdefault(role, len(self._roles)) for role in used["role"].to_pylist()]
        rows["prompt_tokens"], rows["tokens"] = lengths["prompt_token_ids"], lengths["token_ids"]
        rows["finished"] = pc.not_equal(used["finish_reason"], "length").to_numpy(zero_copy_only=False)
        rows["id_hash"] = hashes
        rows["chunk"] = self._chunks + np.arange(len(used)) // CHUNK
        rows["row"] = np.arange(len(used)) % CHUNK
        self._used.append(rows)
        kept = used.select(list(KEPT)).cast(self._schema)
        for start in range(0, len(kept), CHUNK):
            self._file.write_batch(kept.slice(start, CHUNK))
            self._chunks += 1

    def check_ids(self) -> None:
        """No sample may be there twice."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._ids])
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        ends = np.cumsum(self._rows)
        for first, second in zip(order[same], order[same + 1], strict=True):
            (_, id), (file, other) = (self._id(int(place), ends) for place in (first, second))
            if id == other:  # and not only their hashes
                raise UnusableData(f"sample {id} is there twice, the second time in {file}")

    def _id(self, place: int, ends: NDArray[np.int64]) -> tuple[Path, str]:
        number = int(np.searchsorted(ends, place, side="right"))
        row = place - int(ends[number]) + self._rows[number]
        file = self._files[number]
        return file, pq.read_table(file, columns=["sample_id"])["sample_id"][row].as_py()

    def weights_hash(self) -> str:
        """What all samples were drawn with."""
        if len(self._weights) != 1:
            found = ", ".join(sorted(self._weights))
            raise UnusableData(f"the samples were drawn with different weights: {found}")
        return next(iter(self._weights))

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the roles that were read, in an order that does not depend on that of the files."""
        return tuple(sorted(self._roles))

    def index(self, group_size: int, groups: int) -> tuple[NDArray[Any], Counts]:
        """The samples of all groups that can be used, ordered, and what became of the others."""
        found = np.concatenate([np.empty(0, self._dtype), *self._used])
        found["role"] = np.array([self.roles.index(role) for role in self._roles], np.int16)[found["role"]]
        found = found[np.lexsort((found["attempt"], found["role"], found["group"]))]
        sizes = np.diff(_bounds(found))
        index, used = found[np.repeat(sizes > 1, sizes)], sizes[sizes > 1]
        samples = sum(self._rows)
        left_out = samples - len(found)
        if not len(used):
            raise UnusableData(f"{left_out} of {samples} samples were left out: no group has two to compare")
        bounds = np.concatenate(([0], np.cumsum(used)))
        return index, Counts(
            samples=samples,
            left_out=left_out,
            groups=groups,
            dropped_groups=groups - len(used),
            short_groups=int((used < group_size).sum()),
            equal_groups=int(have_equal_rewards(index["reward"].astype(np.float64), bounds).sum()),
        )


def _check(batch: pa.RecordBatch, lengths: dict[str, NDArray[np.int32]], file: Path) -> None:
    """Every sample must have tokens, a log-probability for each, and a reward that is a number."""
    prompts, tokens, logprobs = (lengths[name] for name in TOKENS)
    values = batch["logprobs"].flatten().to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(batch)), logprobs)
    infinite = np.zeros(len(batch), np.bool_)
    infinite[owner[~np.isfinite(values)]] = True
    complaints: Sequence[tuple[NDArray[np.bool_], Callable[[int], str]]] = (
        ((tokens == 0) | (prompts == 0), lambda row: "has no tokens"),
        (tokens != logprobs, lambda row: f"has {tokens[row]} tokens and {logprobs[row]} log-probabilities"),
        (infinite, lambda row: "has a log-probability that is no number"),
        (~np.isfinite(batch["reward"].to_numpy(zero_copy_only=False)), lambda row: "has a reward that is no number"),
    )
    for wrong, complaint in complaints:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UnusableData(f"sample {batch['sample_id'][row].as_py()} in {file} {complaint(row)}")


class _Chunks:
    """Reads samples from `samples.arrow`. The chunks read last stay in memory: a group is in one or two of them."""

    def __init__(self, path: Path, roles: Sequence[str], parts: Sequence[str]) -> None:
        self._roles, self._parts = roles, parts
        # Read, not mapped: what is mapped counts as a process's memory once it was touched, and an epoch touches all.
        self._file = pa.ipc.open_file(pa.OSFile(str(path)))
        self._kept: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def __call__(self, places: NDArray[Any]) -> list[Rollout]:
        """See `Rows`."""
        return [self._rollout(place) for place in places]

    def _chunk(self, number: int) -> pa.RecordBatch:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        found = self._kept[number] = self._file.get_batch(number)
        if len(self._kept) > CHUNKS_IN_MEMORY:
            self._kept.popitem(last=False)
        return found

    def _rollout(self, place: Any) -> Rollout:
        chunk, row = self._chunk(int(place["chunk"])), int(place["row"])
        prompt, tokens, logprobs = (chunk[name][row].values.to_numpy(zero_copy_only=False).copy() for name in TOKENS)
        return Rollout(
            id=chunk["sample_id"][row].as_py(),
            row_id=chunk["row_id"][row].as_py(),
            group=int(place["group"]),
            role=self._roles[place["role"]],
            attempt=int(place["attempt"]),
            prompt_ids=prompt,
            token_ids=tokens,
            logprobs=logprobs,
            finished=bool(place["finished"]),
            parts={part: float(place[f"reward_{part}"]) for part in self._parts},
            reward=float(place["reward"]),
        )
