"""A run of ProSetting whose data are put in the place of what its stages would make: sums. Not a test module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hpc_rl import config as configs
from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.data.questions import Question, write_questions
from hpc_rl.grading.samples import read_samples
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.manifest import Manifest, StoredManifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.data.columns import CHAT
from tools import tiny_sums

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "tests/training/prosetting.yaml"
PAIRS = pa.schema([
    ("pair_id", pa.string()), ("question_id", pa.string()), ("root_id", pa.string()), ("round", pa.int32()),
    ("prompt", CHAT), ("chosen", pa.string()), ("rejected", pa.string()), ("chosen_from", pa.string()),
])  # fmt: skip
TEXTS = pa.schema([("text_id", pa.string()), ("prompt", CHAT), ("completion", pa.string()), ("weight", pa.float32())])
Rows = Sequence[Mapping[str, Any]]


def open_(root: Path, *settings: str) -> Workspace:
    """Write a run's config."""
    config = configs.load(CONFIG, settings, {}, root, cwd=REPOSITORY)
    assert isinstance(config, ProSettingConfig)
    open_run(config, CONFIG)
    return Workspace(root)


def pairs(sums: Sequence[tiny_sums.Sum], round: int = 1) -> Rows:
    """The right answer to each sum, and the one that forgets the carry."""
    return [
        {
            "pair_id": f"r{round:02d}-{a}+{b}", "question_id": f"{a}+{b}", "root_id": f"{a}+{b}", "round": round,
            "prompt": [{"role": "user", "content": tiny_sums.question((a, b))}],
            "chosen": tiny_sums.answer((a, b)), "rejected": tiny_sums.forgetful((a, b)), "chosen_from": "reference",
        }
        for a, b in sums
    ]  # fmt: skip


def commit_data(ws: Workspace, train: Rows, validation: Rows = (), texts: Rows = (), round: int = 1) -> None:
    """Commit the stage dpo_data."""
    folder = ws.stage_dir(round, "dpo_data")
    folder.mkdir(parents=True)
    files = {"train": (train, PAIRS), "validation": (validation, PAIRS), "generator": (texts, TEXTS)}
    for name, (rows, schema) in files.items():
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), folder / f"{name}.parquet")
    outputs = tuple(manifest.describe_output(ws, folder / f"{name}.parquet") for name in files)
    manifest.write(ws, Manifest(round, "dpo_data", 0, outputs))  # what it needs itself is not there


def collect(ws: Workspace, sums: Sequence[tiny_sums.Sum], round: int = 1) -> None:
    """Commit a pool of sums, and sample attempts at them."""
    from jobs import sample

    questions = [
        Question(f"q{n:06d}", tiny_sums.question(one), tiny_sums.answer(one), None, f"q{n:06d}", None, 0, "", "train",
                 "initial") for n, one in enumerate(sums)
    ]  # fmt: skip
    job = load(ws.root, round - 1, "pool")
    job.folder.mkdir(parents=True, exist_ok=True)
    for shard in job.shards():
        path = shard.output("questions.parquet")
        write_questions(path, questions)
        shard.commit([path], made_from={})
    assert sample.main(["--workspace", str(ws.root), "--round", str(round), "--stage", "collect"]) == 0


def grade_by_rule(ws: Workspace, sums: Sequence[tiny_sums.Sum], round: int = 1) -> None:
    """Commit the attempts at sums, as they are right or wrong."""
    worth: dict[int, dict[int, float]] = {}
    for made in manifest.Manifests(ws, round, "collect", load(ws.root, round, "collect").stage.shards):
        for one in read_samples(made.path("samples.parquet")):
            right = float(one.text == tiny_sums.answer(sums[one.group]))
            worth.setdefault(one.group, {})[one.attempt] = right
    grade(ws, {group: [of[attempt] for attempt in sorted(of)] for group, of in worth.items()}, round)


def grade(ws: Workspace, worth: Mapping[int, Sequence[float | None]], round: int = 1) -> None:
    """Commit the graded attempts: `worth` has the rewards of each group's, None where nobody could say."""
    job = load(ws.root, round, "grade")
    job.folder.mkdir(parents=True, exist_ok=True)
    for shard in job.shards():
        table = pq.read_table(job.input(round, "collect", shard.index).path("samples.parquet"))
        rewards = [
            worth[group][attempt]
            for group, attempt in zip(table["group"].to_pylist(), table["attempt"].to_pylist(), strict=True)
        ]
        for name, kind, column in (
            ("reward_correctness", pa.float64(), rewards), ("reward", pa.float64(), rewards),
            ("left_out", pa.bool_(), [one is None for one in rewards]),
        ):  # fmt: skip
            table = table.append_column(name, pa.array(column, kind))
        path = shard.output("graded.parquet")
        pq.write_table(table, path)
        shard.commit([path], made_from={})


def trained(ws: Workspace, round: int = 1, stage: str = "train") -> StoredManifest:
    """Train in this process; the manifest."""
    from jobs import train

    assert train.main(["--workspace", str(ws.root), "--round", str(round), "--stage", stage]) == 0
    return manifest.read(ws, round, stage, 0)
