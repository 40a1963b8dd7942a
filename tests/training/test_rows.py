"""Data on the node's disk: read strictly, in order, once; what cannot be used is named with file, row and column."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpc_rl.training.data import rows, texts
from hpc_rl.training.data.texts import Text
from hpc_rl.training.data.units import Units
from hpc_rl.training.errors import NothingToLearn, UnusableData
from tests.full_disk import full_disk

GOOD = {"text_id": ["a", "b", "c"], "prompt_token_ids": [[1], [2, 2], [3]], "completion_token_ids": [[4], [5], [6, 7]]}


def read(folder: Path, *tables: Mapping[str, Any], **options: Any) -> Units[Text]:
    """Write a file of each table, and read them as texts."""
    files = [folder / f"{number}.parquet" for number in range(len(tables))]
    for file, columns in zip(files, tables, strict=True):
        pq.write_table(pa.table(dict(columns)), file)
    return texts.read(files, None, **options)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"prompt_token_ids": [[1], None, [3]]}, "row 1, text_id b, column prompt_token_ids: there is nothing"),
        ({"completion_token_ids": [[4], [5], []]}, "row 2, text_id c, column completion_token_ids: it is empty"),
        ({"prompt_token_ids": [[1], [2, None], [3]]}, "row 1, text_id b, .*: a part of it is missing"),
        ({"prompt_token_ids": [[1], [2], [-3]]}, "row 2, text_id c, .*: it holds a negative token id"),
        (
            {"prompt_token_ids": [[1], [2], [2**40]]},
            r"row 2, column prompt_token_ids: expected is a list of token ids, but",
        ),
        ({"prompt_token_ids": ["x", "y", "z"]}, "prompt_token_ids is string; expected is a list of token ids"),
        ({"text_id": [1, 2, 3]}, "column text_id is int64; expected is a string"),
        ({"text_id": ["a", "b", "a"]}, "text_id a is there twice, the second time in .*0.parquet"),
        ({"weight": [1.0, float("nan"), 1.0]}, "row 1, text_id b, column weight: it is no finite number"),
        ({"weight": [1.0, 1.0, -0.5]}, "row 2, text_id c, column weight: it is negative"),
        ({"weight": [0, 0, 0]}, "the weights of all 3 texts are 0"),
        ({"weight": ["1", "1", "1"]}, "column weight is string; expected is a number"),
        ({"completion_token_ids": [[4], [50], [6]]}, "row 1, text_id b, .* it holds token 50, but .* last one is 49"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, changed: dict[str, Any], complaint: str) -> None:
    table = {**GOOD, "weight": [1.0, 1.0, 1.0], **changed}
    with pytest.raises(UnusableData, match=rf"0\.parquet.*{complaint}|{complaint}"):
        read(tmp_path, table, weighted=True, vocabulary=50)


def test_a_row_is_counted_from_the_start_of_its_file(tmp_path: Path) -> None:
    many = {name: values * 700 for name, values in GOOD.items() if name != "text_id"}
    many["text_id"] = [f"x{number}" for number in range(2100)]
    many["prompt_token_ids"] = [*many["prompt_token_ids"][:2000], [], *many["prompt_token_ids"][2001:]]
    with pytest.raises(UnusableData, match=r"1\.parquet, row 2000, text_id x2000, column prompt_token_ids"):
        read(tmp_path, GOOD, many)


def test_a_missing_column_and_a_file_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UnusableData, match=r"has the columns text_id, prompt; needed are prompt_token_ids and comp.* or"
    ):
        read(tmp_path, {"text_id": ["a"], "prompt": ["x"]})
    with pytest.raises(UnusableData, match=r"needed are text_id and .*weight"):
        read(tmp_path, GOOD, weighted=True)
    (tmp_path / "no.parquet").write_bytes(b"PK not this")
    with pytest.raises(UnusableData, match=r"no\.parquet is not a parquet file"):
        texts.read([tmp_path / "no.parquet"], None)


def test_other_widths_of_the_same_types_are_read(tmp_path: Path) -> None:
    table = {
        "text_id": pa.array(GOOD["text_id"]).dictionary_encode(),
        "prompt_token_ids": pa.array(GOOD["prompt_token_ids"], pa.large_list(pa.uint16())),
        "completion_token_ids": pa.array(GOOD["completion_token_ids"], pa.list_(pa.int64())),
        "weight": pa.array([1, 0, 3], pa.int8()),
    }
    found = read(tmp_path, table, weighted=True).rows(np.arange(3))
    assert [(t.id, t.prompt_ids.tolist(), t.completion_ids.tolist(), t.weight) for t in found] == [
        ("a", [1], [4], 1.0), ("b", [2, 2], [5], 0.0), ("c", [3], [6, 7], 3.0)
    ]  # fmt: skip
    assert found[0].prompt_ids.dtype == np.int32


def test_too_long_is_an_error_or_dropped_and_counted(tmp_path: Path) -> None:
    complaint = r"0\.parquet, row 1, text_id b, .* ends at token 3, but max_length is 2: raise .* too_long: drop"
    with pytest.raises(UnusableData, match=complaint):
        read(tmp_path, GOOD, max_length=2)
    found = read(tmp_path, GOOD, max_length=2, too_long="drop")
    assert [text.id for text in found.rows(np.arange(len(found)))] == ["a"]
    assert found.numbers() == {
        "units": 1, "too_long": 2, "tokens": 2, "length_min": 2, "length_median": 2, "length_p95": 2, "length_max": 2
    }  # fmt: skip
    with pytest.raises(NothingToLearn, match="no text is left: 3 were read, 3 are too long"):
        read(tmp_path, GOOD, max_length=1, too_long="drop")
    with pytest.raises(NothingToLearn, match="no text is left: 0 were read"):
        read(tmp_path)


def test_the_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    weights = {"weight": [1.0, 2.0, 3.0]}
    digest = read(tmp_path, {**GOOD, **weights}, weighted=True).digest
    assert digest == read(tmp_path, {**GOOD, **weights}, weighted=True).digest
    others = ({"weight": [1.0, 2.0, 4.0]}, {"completion_token_ids": [[4], [5], [6, 8]]}, {"text_id": ["a", "b", "d"]})
    assert digest not in {read(tmp_path, {**GOOD, **weights, **other}, weighted=True).digest for other in others}


def test_rows_come_back_from_every_chunk_and_the_files_have_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than fit into a chunk, a read, or what is kept of chunks."""
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(node))
    rng = np.random.default_rng(0)
    tables = []
    for shard in range(3):
        lists = [[rng.integers(0, 99, rng.integers(1, 20)).tolist() for _ in range(1100)] for _ in range(2)]
        names = [f"{shard}-{number}" for number in range(1100)]
        tables.append({"text_id": names, "prompt_token_ids": lists[0], "completion_token_ids": lists[1]})
    found = read(tmp_path, *tables)
    assert list(node.iterdir()) == [] and len(found) == 3300
    places = rng.permutation(3300)
    for place, text in zip(places, found.rows(places), strict=True):
        table, row = tables[place // 1100], place % 1100
        assert text.id == table["text_id"][row]
        assert text.prompt_ids.tolist() == table["prompt_token_ids"][row]
        assert text.completion_ids.tolist() == table["completion_token_ids"][row]
        assert found.lengths[place] == len(text.prompt_ids) + len(text.completion_ids)


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(node))

    read(tmp_path, GOOD)
    with (
        full_disk(),
        pytest.raises(OSError, match=r"no room for the round's texts in .*Set TMPDIR to a folder") as found,
    ):
        texts.read([tmp_path / "0.parquet"], None)
    assert found.value.errno == errno.ENOSPC and list(node.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=r"no room for the round's texts"):
        close = rows.Writer.save

        def save(*given: Any) -> rows.Written:
            with full_disk():
                return close(*given)

        patch.setattr(rows.Writer, "save", save)
        texts.read([tmp_path / "0.parquet"], None)
    assert list(node.iterdir()) == []


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    none = pa.table(GOOD).slice(0, 0)
    pq.write_table(none, tmp_path / "none.parquet")
    pq.write_table(pa.table(GOOD), tmp_path / "some.parquet")
    assert len(texts.read([tmp_path / "none.parquet", tmp_path / "some.parquet"], None)) == 3
