"""A shard is done when its manifest is there: the first stands, damage is noticed, foreign files are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.run import manifest
from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.manifest import DamagedOutput, Manifest, describe_output, done_shards, manifest_path, read
from hpc_rl.run.workspace import SCHEMA, Workspace


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "run")


def commit(ws: Workspace, shard: int = 0, content: bytes = b"rows", token: str = "t") -> bool:
    path = ws.stage_dir(1, "sample") / f"shard_{shard:04d}.{token}.samples.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return manifest.write(ws, Manifest(1, "sample", shard, (describe_output(ws, path),), {"seed": 7}, {"tokens": 3}))


def test_what_is_written_is_read_back(ws: Workspace) -> None:
    assert commit(ws, 3)
    found = read(ws, 1, "sample", 3)
    assert (found.round, found.stage, found.shard) == (1, "sample", 3)
    assert (found.made_from, found.metrics) == ({"seed": 7}, {"tokens": 3})
    assert found.path("samples.parquet").read_bytes() == b"rows"


def test_the_first_manifest_stands_and_the_second_worker_is_told(ws: Workspace) -> None:
    assert commit(ws, content=b"first", token="a")
    assert not commit(ws, content=b"second", token="b")
    assert read(ws, 1, "sample", 0).path("samples.parquet").read_bytes() == b"first"


def test_only_manifests_count_as_done(ws: Workspace) -> None:
    assert done_shards(ws, 1, "sample") == frozenset()
    commit(ws, 0)
    commit(ws, 12_345)
    folder = ws.stage_dir(1, "sample")
    for name in (".tmp-shard_0001.json-1-ab", "shard_0002.lease.0001", "shard_0003.progress", "shard_0004.json.bak"):
        (folder / name).touch()
    (folder / "attempts").mkdir()
    assert done_shards(ws, 1, "sample") == {0, 12_345}


def test_a_workspace_may_be_moved(ws: Workspace, tmp_path: Path) -> None:
    commit(ws)
    ws.root.rename(tmp_path / "elsewhere")
    assert read(Workspace(tmp_path / "elsewhere"), 1, "sample", 0).path("samples.parquet").read_bytes() == b"rows"


@pytest.mark.parametrize("damage", ["cut off", "changed", "removed"])
def test_a_damaged_output_is_noticed_with_the_way_to_make_it_again(ws: Workspace, damage: str) -> None:
    commit(ws, content=b"0123456789")
    output = read(ws, 1, "sample", 0).path("samples.parquet")
    if damage == "cut off":
        output.write_bytes(b"012345")
    elif damage == "changed":
        output.write_bytes(b"0123456780")
    else:
        output.unlink()
    with pytest.raises(DamagedOutput, match=r"samples\.parquet is missing or changed .* Remove .*shard_0000\.json"):
        read(ws, 1, "sample", 0).path("samples.parquet")


def test_an_output_must_be_named_without_doubt(ws: Workspace) -> None:
    commit(ws)
    with pytest.raises(KeyError, match=r"0 outputs of sample shard 0 end with 'graded\.parquet'"):
        read(ws, 1, "sample", 0).path("graded.parquet")


def test_a_manifest_of_a_newer_version_is_refused(ws: Workspace) -> None:
    commit(ws)
    path = manifest_path(ws, 1, "sample", 0)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": SCHEMA + 1, "new_field": 1}))
    with pytest.raises(CorruptFile, match=f"newer hpc_rl .schema {SCHEMA + 1}, this one reads {SCHEMA}"):
        read(ws, 1, "sample", 0)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"schema": 1, "outputs": [3]}', '{"schema": "1"}', "7"])
def test_what_is_no_manifest_is_named(ws: Workspace, text: str) -> None:
    path = manifest_path(ws, 1, "sample", 0)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(CorruptFile, match=r"shard_0000\.json"):
        read(ws, 1, "sample", 0)


def test_a_shard_that_is_not_done_has_no_manifest(ws: Workspace) -> None:
    with pytest.raises(FileNotFoundError):
        read(ws, 1, "sample", 0)


numbers = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(), st.booleans(), st.none())


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.one_of(numbers, st.lists(numbers, max_size=3)), max_size=4))
def test_any_metrics_survive_the_file(metrics: dict[str, Any]) -> None:
    text = Manifest(1, "sample", 0, (), metrics=metrics).to_json()
    assert json.loads(text)["metrics"] == metrics


def test_numpy_numbers_and_paths_become_plain() -> None:
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": Path("/x"), "d": [np.bool_(True)], "e": math.inf}
    assert manifest.to_plain(value) == {"a": 0.5, "b": 3, "c": "/x", "d": [True], "e": math.inf}
