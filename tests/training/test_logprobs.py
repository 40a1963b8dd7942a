"""Log-probabilities of units that are not trained: kept, gone on with after a kill, and checked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from hpc_rl.run import atomic, manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training import algorithms, logprobs
from hpc_rl.training.data.units import id_hashes
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.scores import INDEX, VALUES, Part, Scores
from jobs import reference
from tests.training.on_policy import Sample, commit, draw, open_, train
from tools import tiny_sums


class Named:
    """Units that are known by their names alone."""

    def __init__(self, *ids: str) -> None:
        self.index = {"id_hash": id_hashes(ids)}


def values(*numbers: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(numbers, np.float32)


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """Three batches of one rank, on disk."""
    made = Part(tmp_path / "scores", "0")
    for batch, (ids, numbers) in enumerate([
        (["a", "b"], [values(1, 2), values(3)]), (["c"], [values(4, 5, 6)]), (["d", "e"], [values(7), values(8, 9)]),
    ]):  # fmt: skip
        made.add(batch, ids, numbers)
        made.flush()
    return made


def test_what_was_written_is_read_by_name(part: Part, tmp_path: Path) -> None:
    other = Part(tmp_path / "scores", "1")
    other.add(0, ["f"], [values(-1)])
    other.flush()
    scores = Scores(tmp_path / "scores")
    assert [row.tolist() for row in scores.rows(["c", "f", "a"])] == [[4, 5, 6], [-1], [1, 2]]
    assert scores.sums(Named("e", "b")).tolist() == [17, 3]
    assert scores.table(Named("b", "d")).tolist() == [[3], [7]]
    assert scores.missing(Named("a", "x", "f", "y")).tolist() == [1, 3]


@pytest.mark.parametrize(("torn", "lost"), [(INDEX, 1), (INDEX, 17), (VALUES, 1), (VALUES, 9)])
def test_a_pass_that_was_killed_while_writing_goes_on_after_its_last_whole_batch(
    part: Part, tmp_path: Path, torn: str, lost: int
) -> None:
    file = tmp_path / "scores" / f"0{torn}"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - lost)
    found = Scores(tmp_path / "scores")
    assert not len(found.missing(Named("a", "b", "c"))) and len(found.missing(Named("e")))
    again = Part(tmp_path / "new", "0", [tmp_path / "absent", tmp_path / "scores"])
    assert again.batches in (1, 2), "the last batch of which there is something may not be whole"
    again.begin(again.batches)
    for batch, ids, numbers in [(1, ["c"], [values(4, 5, 6)]), (2, ["d", "e"], [values(7), values(8, 9)])]:
        if batch >= again.batches:
            again.add(batch, ids, numbers)
    again.flush()
    assert [row.tolist() for row in Scores(tmp_path / "new").rows(list("abcde"))] == [
        [1, 2], [3], [4, 5, 6], [7], [8, 9],
    ]  # fmt: skip


def test_what_is_no_number_is_an_error_that_names_the_unit(tmp_path: Path) -> None:
    with pytest.raises(UnusableData, match=r"^b: a model gives it a log-probability that is no number"):
        Part(tmp_path, "0").add(0, ["a", "b"], [values(1), values(float("nan"))])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing."""
    return tiny_sums.save(tiny_sums.untaught(), tmp_path_factory.mktemp("untaught") / "model")


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Four groups of four, whose rewards differ within each."""
    samples = draw(open_(tmp_path_factory.mktemp("drawn"), model))
    return [replace(one, reward=(0.0, n % 4 / 3)) for n, one in enumerate(samples)]


def test_a_pass_is_not_done_again_and_a_half_done_one_is_gone_on_with(
    model: Path, tmp_path: Path, drawn: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = open_(tmp_path, model, "grpo.beta=0.5", "grpo.per_device_batch_size=4", "sample.samples_per_prompt=4")
    commit(ws, drawn)
    asked: list[int] = []
    whole, at = logprobs.completions, 2

    def dies(model: Any, batch: Any) -> Any:
        asked.append(1)
        if len(asked) > at:
            raise KeyboardInterrupt
        return whole(model, batch)

    monkeypatch.setattr(logprobs, "SAFE_S", 0.0)
    monkeypatch.setattr(logprobs, "completions", dies)
    with pytest.raises(KeyboardInterrupt):
        train(ws)
    at = 100
    asked.clear()
    found = train(ws)
    assert len(asked) == 3, "of four batches one was safe for certain: the last one that was written may be torn"
    undisturbed = open_(tmp_path / "other", model, "grpo.beta=0.5", "grpo.per_device_batch_size=4")
    commit(undisturbed, drawn)
    asked.clear()
    assert train(undisturbed).losses == found.losses and len(asked) == 4


def test_a_stage_that_scored_other_units_or_with_other_weights_is_refused(
    model: Path, tmp_path: Path, drawn: list[Sample]
) -> None:
    ws = open_(tmp_path / "one", model, "grpo.beta=0.5", "grpo.reference=stage")
    commit(ws, drawn)
    assert reference.main(["--workspace", str(ws.root), "--round", "1"]) == 0
    shutil.copytree(ws.root, tmp_path / "two")
    stored = manifest.manifest_path(ws, 1, "reference", 1)
    data = atomic.read_json(stored)
    path = ws.resolve(data["outputs"][0]["path"])
    table = pq.read_table(path)
    lost = table["unit_id"][0].as_py()
    pq.write_table(table.slice(1), path)
    data["outputs"][0].update(bytes=path.stat().st_size, sha256=manifest.sha256_of(path))
    atomic.write_json(stored, data)
    with pytest.raises(UnusableData, match=f"^1 of 16 units have no log-probabilities, the first is {lost}. Remove"):
        train(ws)
    other = Workspace(tmp_path / "two")
    stored = manifest.manifest_path(other, 1, "reference", 0)
    data = atomic.read_json(stored)
    data["made_from"]["weights"] = "f" * 64
    atomic.write_json(stored, data)
    with pytest.raises(UnusableData, match=r"scored with weights ffffffffffffffff, but the reference is .* Remove"):
        train(other)


def test_a_task_loads_the_reference_once_for_all_of_its_shards(
    model: Path, tmp_path: Path, drawn: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    ws = open_(tmp_path, model, "grpo.beta=0.5", "grpo.reference=stage")
    commit(ws, drawn)
    with caplog.at_level("INFO"):
        assert reference.main(["--workspace", str(ws.root), "--round", "1"]) == 0
    assert [manifest.read(ws, 1, "reference", shard).metrics["units"] for shard in range(2)] == [8, 8]
    assert sum("attention" in record.getMessage() for record in caplog.records) == 1, "a model that is loaded says so"


def test_a_shard_without_anything_to_train_on_has_an_output_without_rows(
    model: Path, tmp_path: Path, drawn: list[Sample]
) -> None:
    ws = open_(tmp_path, model, "grpo.beta=0.5", "grpo.reference=stage")
    commit(ws, [replace(one, reward=None) if n % 8 >= 4 else one for n, one in enumerate(drawn)])
    assert reference.main(["--workspace", str(ws.root), "--round", "1"]) == 0
    assert [manifest.read(ws, 1, "reference", shard).metrics["units"] for shard in range(2)] == [8, 0]
    assert train(ws).metrics["used_samples"] == 8


@pytest.mark.parametrize("name", ["grpo", "rloo", "dpo", "joint"])
def test_an_algorithm_whose_config_names_a_reference_stage_can_be_scored_by_it(name: str) -> None:
    scored = algorithms.load_scored(name)
    assert callable(scored.units_of)
    assert callable(scored.scoring)
    assert callable(scored.reference_weights)
