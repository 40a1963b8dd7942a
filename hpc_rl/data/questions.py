"""Questions of a round: what one holds, and how they are stored."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpc_rl.data.row_writer import RowWriter

if TYPE_CHECKING:
    from hpc_rl.config.prosetting import QuestionsConfig

ROWS = 4096
"""Questions in one row group."""

Split = Literal["train", "validation", "held_out"]
Reason = Literal["initial", "enhanced", "failed", "replay"]


@dataclass(frozen=True)
class Question:
    """One question of a round's pool.

    Attributes
    ----------
    question_id
        Unique in the run; `q000017` of the 17th of the file, `q000017.r02` of the variant that round 2 made of it.
        Those of a held-out file are `h000001` and so on.
    question, answer
        What is asked, and the reference answer.
    solution
        A worked solution; None where there is none.
    root_id
        The question of the file that it comes from; its own id for those.
    parent_id
        The question that it is a variant of; None for those of the file.
    made_in
        The round that made it; 0 for those of the file.
    kind
        `harder` or `targeted`: what the variant was meant to be (S4); "" for those of the file.
    split
        Where its pairs go: that of its root.
    reason
        Why it is in this round's pool.
    """

    question_id: str
    question: str
    answer: str
    solution: str | None
    root_id: str
    parent_id: str | None
    made_in: int
    kind: str
    split: Split
    reason: Reason


def chat(options: QuestionsConfig, question: str) -> list[dict[str, str]]:
    """How the solver is asked: messages of `role` and `content`, the same when it is sampled, trained and evaluated."""
    system = [] if options.system_prompt is None else [{"role": "system", "content": options.system_prompt}]
    return [*system, {"role": "user", "content": options.prompt.replace("{question}", question)}]


def text_key(text: str) -> bytes:
    """What two questions have in common that are the same one: 16 bytes of the text without case and spacing.

    Case does not count, although there are a few questions ("find A", "find a") that differ in it alone: to lose one of
    those costs nothing, to train on a held-out question in another case costs the evaluation its meaning.
    """
    plain = text if text.isascii() else unicodedata.normalize("NFC", text)
    return hashlib.blake2b(" ".join(plain.casefold().split()).encode(), digest_size=16).digest()


def shard_range(questions: int, shards: int, index: int) -> range:
    """The places of a shard's questions in a pool: shards differ by one question at most, and may be empty."""
    return range(index * questions // shards, (index + 1) * questions // shards)


def schema() -> Any:
    """Of a parquet file of questions."""
    import pyarrow as pa

    types = {"made_in": pa.int32()}
    return pa.schema([(field.name, types.get(field.name, pa.string())) for field in fields(Question)])


def write_questions(path: Path, questions: Iterable[Question]) -> int:
    """Write questions in order, a row group in memory at a time; how many."""
    with RowWriter(path, schema(), ROWS) as writer:
        for question in questions:
            writer.add(question)
    return writer.rows


def iter_questions(path: Path, places: range | None = None) -> Iterator[Question]:
    """The questions of a file in order; with `places` those of a shard alone, of which only its row groups are read."""
    import pyarrow.parquet as pq

    first = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            inside = range(first, first + size)
            first += size
            if places is not None and (inside.stop <= places.start or places.stop <= inside.start):
                continue
            for place, row in zip(inside, file.read_row_group(group).to_pylist(), strict=True):
                if places is None or place in places:
                    yield Question(**row)


def iter_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Id and text of each question of a file, in order; nothing else is read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=["question_id", "question"]):
            yield from zip(batch["question_id"].to_pylist(), batch["question"].to_pylist(), strict=True)


def count_questions(path: Path) -> int:
    """How many a file has; only its footer is read."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)
