"""Texts to be imitated: a prompt and its completion each, with a weight where it is asked for; packed where wanted.

A parquet file of texts has the columns

    text_id                                     string, unique in the round
    prompt_token_ids, completion_token_ids      lists of token ids; or in their place
    prompt, completion                          strings, or a chat and what the assistant answers (`encoding`)
    weight                                      number from 0, read where it is asked for
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hpc_rl.engines.base import NO_VARIABLES
from hpc_rl.training.data import encoding
from hpc_rl.training.data.columns import NUMBER, STRING, TOKENS
from hpc_rl.training.data.limits import Limits, TooLong
from hpc_rl.training.data.rows import Chunks, Writer, Written, once, open_index, room
from hpc_rl.training.data.units import INDEX, Units, alone
from hpc_rl.training.errors import NothingToLearn, UnusableData

log = logging.getLogger(__name__)

ID, PROMPT, COMPLETION = "text_id", "prompt_token_ids", "completion_token_ids"
SCHEMA = pa.schema([(ID, STRING), (PROMPT, TOKENS), (COMPLETION, TOKENS)])


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt, and the completion that is learned.

    Attributes
    ----------
    id
        Its name.
    prompt_ids, completion_ids
        (P,) and (T,) int32.
    weight
        What its part of the loss is multiplied by.
    """

    id: str
    prompt_ids: NDArray[np.int32]
    completion_ids: NDArray[np.int32]
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Pack:
    """Texts that go through the model as one row. They do not see each other."""

    texts: tuple[Text, ...]

    @property
    def id(self) -> str:
        """Names of its texts."""
        return "+".join(text.id for text in self.texts)


def read(
    files: Iterable[Path], tokenizer: Any, *, max_length: int | None = None, too_long: TooLong = "error",
    vocabulary: int | None = None, weighted: bool = False, rank: int = 0,
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> Units[Text]:  # fmt: skip
    """The texts of a round, in the order of the files. All ranks must call it; the first of each node reads.

    Parameters
    ----------
    files
        One per shard.
    tokenizer
        For texts that are no token ids yet.
    variables
        Of its chat template (`chat_template_kwargs`).
    max_length, too_long
        Most tokens of prompt and completion together, and what becomes of a text that has more.
    vocabulary
        Tokens of the model; None: not checked.
    weighted
        Whether texts have weights; else all are 1.

    Raises
    ------
    UnusableData
        When a text is damaged, or is there twice; NothingToLearn when there is none.
    OSError
        When the disk is full.
    """
    encoder, limits = encoding.Encoder(tokenizer, variables), Limits(max_length, too_long, vocabulary)
    units = once(rank, lambda folder: _write(files, folder, encoder, limits, weighted), _open)
    log.info("texts: %s", units.numbers())
    return units


def _write(files: Iterable[Path], folder: Path, encoder: encoding.Encoder, limits: Limits, weighted: bool) -> Written:
    more = {"weight": NUMBER} if weighted else {}
    with room(folder, "texts"), Writer(folder, ID, SCHEMA, [("weight", np.float32)]) as writer:
        for file in files:
            for rows, found in encoding.tokens(file, ID, ["completion"], encoder, more):
                limits.check(rows, found)
                lengths = sum(pc.list_value_length(found[name]).to_numpy() for name in (PROMPT, COMPLETION))
                weights = rows.numbers("weight") if weighted else np.ones(len(rows))
                rows.refuse_first(weights < 0, "weight", "it is negative")
                keep = limits.keep(rows, "completion", lengths)
                kept = pa.RecordBatch.from_pydict({ID: rows[ID], **found}).filter(pa.array(keep))
                index = writer.add(file, rows.ids, keep, kept)
                index["length"], index["weight"] = lengths[keep], weights[keep]
        index = writer.index()
        left_out = {"too_long": writer.read - len(index)}
        if not len(index):
            raise NothingToLearn(f"no text is left: {writer.read} were read, {left_out['too_long']} are too long")
        if not index["weight"].any():
            raise NothingToLearn(f"the weights of all {len(index)} texts are 0")
        return writer.save(index, left_out)


def _open(written: Written) -> Units[Text]:
    index, chunks = open_index(written.folder), Chunks(written.folder)

    def reader(places: NDArray[Any]) -> list[Text]:
        rows = [(chunks(place), place) for place in places]
        return [Text(row[ID], row.array(PROMPT), row.array(COMPLETION), float(at["weight"])) for row, at in rows]

    return Units(index, alone(len(index)), reader, written.digest, left_out=written.left_out)


def pack(units: Units[Text], room: int) -> Units[Pack]:
    """Texts in packs of at most so many tokens: the longest first, each where it leaves the least room (best fit).

    Which texts go together depends on their lengths and order alone.

    Raises
    ------
    UnusableData
        When a text is longer.
    """
    longest = int(np.argmax(units.lengths))
    if units.lengths[longest] > room:
        raise UnusableData(
            f"text {units.rows(np.array([longest]))[0].id} has {units.lengths[longest]} tokens, but a pack has room "
            f"for {room}: raise max_length, or leave out what is too long with too_long: drop"
        )
    packs = _best_fit(units.lengths, room)
    order = np.argsort(packs, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(packs))))
    index = np.zeros(len(starts) - 1, np.dtype([*INDEX, ("first", np.int64), ("texts", np.int32)]))
    index["first"], index["texts"] = starts[:-1], np.diff(starts)
    index["length"] = np.add.reduceat(units.lengths[order], starts[:-1])
    index["id_hash"] = np.bitwise_xor.reduceat(units.index["id_hash"][order], starts[:-1])

    def reader(places: NDArray[Any]) -> list[Pack]:
        members = (order[int(at["first"]) : int(at["first"] + at["texts"])] for at in places)
        return [Pack(tuple(units.rows(texts))) for texts in members]

    found: Units[Pack] = Units(
        index, alone(len(index)), reader, units.digest, left_out={"texts": len(units), **units.left_out}
    )
    log.info("packs: %s", found.numbers())
    return found


def _best_fit(lengths: NDArray[np.int32], room: int) -> NDArray[np.int64]:
    """(N,) in which pack each text goes."""
    packs = np.zeros(len(lengths), np.int64)
    open: defaultdict[int, list[int]] = defaultdict(list)  # packs by the room that they have
    rooms, made = 0, 0  # bit n of rooms: some pack has room for n tokens more
    for place in np.argsort(-lengths.astype(np.int64), kind="stable"):
        length = int(lengths[place])
        enough = rooms >> length
        if enough:
            left = length + (enough & -enough).bit_length() - 1
            number = open[left].pop()
            if not open[left]:
                rooms ^= 1 << left
        else:
            left, number, made = room, made, made + 1
        packs[place] = number
        open[left - length].append(number)
        rooms |= 1 << (left - length)
    return packs
