"""A round's graded samples, read, checked and put into groups: what `rollouts` are made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hpc_rl.training.data.columns import READ_AT_ONCE, choose, owners
from hpc_rl.training.data.rollouts import Counts, Rollout, Rollouts, have_equal_rewards, index_columns
from hpc_rl.training.data.rows import Chunks, Writer, Written, once, open_index, room
from hpc_rl.training.errors import NothingToLearn, UnusableData

log = logging.getLogger(__name__)

TOKENS = ("prompt_token_ids", "token_ids", "logprobs")
READ = (
    "sample_id", "row_id", *TOKENS, "reward", "group", "role", "attempt", "finish_reason", "weights_hash", "left_out"
)  # fmt: skip
SCHEMA = pa.schema([
    ("sample_id", pa.string()), ("row_id", pa.string()), ("prompt_token_ids", pa.list_(pa.int32())),
    ("token_ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float32())),
])  # fmt: skip


@dataclass(frozen=True)
class _Samples:
    """What one rank of a node tells the others."""

    written: Written
    roles: tuple[str, ...]
    parts: tuple[str, ...]
    counts: Counts
    weights_hash: str


def read(files: Iterable[Path], parts: Sequence[str], group_size: int, groups: int | None, rank: int = 0) -> Rollouts:
    """The rollouts of a round. All ranks must call it; only the first rank of each node goes through `files`.

    Parameters
    ----------
    files
        Graded parquet files, one per shard.
    parts
        Parts of the reward: a column `reward_PART` for each.
    group_size
        G: how many samples each role was to have of each prompt.
    groups
        How many groups the round has: prompts × roles. One that no completion was accepted for is in no file, and
        dropped. None: as many as are in the files.

    Raises
    ------
    UnusableData
        When a sample is there twice, was drawn with other weights than the rest, or is damaged; NothingToLearn when no
        group is left.
    OSError
        When the disk is full.
    """

    def write(folder: Path) -> _Samples:
        with room(folder, "samples"), _Writer(folder, parts) as writer:
            for file in files:
                writer.take(file)
            return writer.finish(group_size, groups)

    rollouts = once(rank, write, _open)
    log.info("samples: %s", rollouts.numbers())
    return rollouts


def _open(samples: _Samples) -> Rollouts:
    index, chunks = open_index(samples.written.folder), Chunks(samples.written.folder)

    def reader(places: NDArray[Any]) -> list[Rollout]:
        return [_rollout(place, chunks, samples) for place in places]

    return Rollouts(
        index, _starts(index), reader, samples.written.digest, roles=samples.roles, parts=samples.parts,
        counts=samples.counts, weights_hash=samples.weights_hash,
    )  # fmt: skip


def _rollout(place: Any, chunks: Chunks, samples: _Samples) -> Rollout:
    row = chunks(place)
    prompt, tokens, logprobs = (row.array(name) for name in TOKENS)
    return Rollout(
        id=row["sample_id"],
        row_id=row["row_id"],
        group=int(place["group"]),
        role=samples.roles[place["role"]],
        attempt=int(place["attempt"]),
        prompt_ids=prompt,
        token_ids=tokens,
        logprobs=logprobs,
        finished=bool(place["finished"]),
        parts={part: float(place[f"reward_{part}"]) for part in samples.parts},
        reward=float(place["reward"]),
    )


def _starts(index: NDArray[Any]) -> NDArray[np.int64]:
    """(G + 1,) where each group, a prompt and a role, starts in an ordered index, and its length."""
    groups, roles = index["group"], index["role"]
    starts = np.flatnonzero((groups[1:] != groups[:-1]) | (roles[1:] != roles[:-1])) + 1
    return np.concatenate(([0], starts, [len(index)])) if len(index) else np.zeros(1, np.int64)


class _Writer(Writer):
    """Writes samples that were graded, and finds their groups."""

    def __init__(self, folder: Path, parts: Sequence[str]) -> None:
        super().__init__(folder, "sample_id", SCHEMA, index_columns(parts))
        self._parts = tuple(parts)
        self._rewards = [f"reward_{part}" for part in parts]
        self._weights: set[str] = set()
        self._roles: dict[str, int] = {}
        self._groups: set[tuple[int, str]] = set()

    def take(self, file: Path) -> None:
        """Write the samples of a file."""
        columns = [*READ, *self._rewards]
        choose(file, columns)
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(READ_AT_ONCE, columns=columns, use_threads=False):
                self._take(batch, file)

    def _take(self, batch: pa.RecordBatch, file: Path) -> None:
        self._weights.update(pc.unique(batch["weights_hash"]).to_pylist())
        self._groups.update(zip(batch["group"].to_pylist(), batch["role"].to_pylist(), strict=True))
        graded = pc.invert(batch["left_out"])
        used = batch.filter(graded)
        lengths = {name: pc.list_value_length(used[name]).to_numpy() for name in TOKENS}
        _check(used, lengths, ("reward", *self._rewards), file)
        rows = self.add(file, batch["sample_id"].to_pylist(), graded.to_numpy(zero_copy_only=False), used)
        for name in ("group", "attempt", "reward", *self._rewards):
            rows[name] = used[name].to_numpy(zero_copy_only=False)
        rows["role"] = [self._roles.setdefault(role, len(self._roles)) for role in used["role"].to_pylist()]
        rows["prompt_tokens"], rows["tokens"] = lengths["prompt_token_ids"], lengths["token_ids"]
        rows["length"] = rows["prompt_tokens"] + rows["tokens"]
        rows["finished"] = pc.not_equal(used["finish_reason"], "length").to_numpy(zero_copy_only=False)

    def finish(self, group_size: int, groups: int | None) -> _Samples:
        """Write the index: the samples of all groups that can be used, ordered."""
        found = self.index()
        if len(self._weights) > 1:
            raise UnusableData(f"the samples were drawn with different weights: {', '.join(sorted(self._weights))}")
        roles = tuple(sorted(self._roles))  # whatever the order of the files
        found["role"] = np.array([roles.index(role) for role in self._roles], np.int16)[found["role"]]
        found = found[np.lexsort((found["attempt"], found["role"], found["group"]))]
        sizes = np.diff(_starts(found))
        index, used = found[np.repeat(sizes > 1, sizes)], sizes[sizes > 1]
        left_out = self.read - len(found)
        if not self.read:
            raise NothingToLearn("the round has no graded samples: no completion of it was accepted")
        if not len(used):
            raise NothingToLearn(f"{left_out} of {self.read} samples were left out: no group has two to compare")
        every = len(self._groups) if groups is None else groups
        counts = Counts(
            samples=self.read,
            left_out=left_out,
            groups=every,
            dropped_groups=every - len(used),
            short_groups=int((used < group_size).sum()),
            equal_groups=int(have_equal_rewards(index["reward"].astype(np.float64), _starts(index)).sum()),
        )
        return _Samples(self.save(index, {}), roles, self._parts, counts, next(iter(self._weights)))


def _check(batch: pa.RecordBatch, lengths: dict[str, NDArray[np.int32]], rewards: Sequence[str], file: Path) -> None:
    """Every sample must have tokens, a log-probability for each, and rewards (columns) that are numbers."""
    prompts, tokens, logprobs = (lengths[name] for name in TOKENS)
    values = batch["logprobs"].flatten().to_numpy(zero_copy_only=False)
    infinite = np.zeros(len(batch), np.bool_)
    infinite[owners(batch["logprobs"])[~np.isfinite(values)]] = True
    bad: NDArray[np.bool_] = ~np.isfinite(
        np.array([batch[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in rewards])
    )
    complaints: Sequence[tuple[NDArray[np.bool_], Callable[[int], str]]] = (
        ((tokens == 0) | (prompts == 0), lambda row: "has no tokens"),
        (tokens != logprobs, lambda row: f"has {tokens[row]} tokens and {logprobs[row]} log-probabilities"),
        (infinite, lambda row: "has a log-probability that is no number"),
        (np.logical_or.reduce(bad), lambda row: f"has a {rewards[int(np.argmax(bad[:, row]))]} that is no number"),
    )
    for wrong, complaint in complaints:
        if wrong.any():
            row = int(np.argmax(wrong))
            sample, of = (batch[name][row].as_py() for name in ("sample_id", "row_id"))
            raise UnusableData(f"sample {sample} (of row {of}) in {file} {complaint(row)}")
