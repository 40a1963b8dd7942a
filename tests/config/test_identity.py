"""Which changes make another experiment."""

from __future__ import annotations

import pytest

from hpc_rl.config.identity import circumstances, config_hash, differing_keys, identity, to_json
from tests.config.conftest import Load

CIRCUMSTANTIAL = (
    "run.rounds=9",
    "run.workspace=/elsewhere",
    "run.name=other",
    "run.lookahead=0",
    "run.lease_ttl_s=5",
    "cluster.partition=gpu",
    "cluster.executor=debug",
    "local.max_parallel_tasks=1",
    "stages.sample.tasks=4",
    "stages.train.time_min=600",
    "logging.debug=true",
    "services.listener.port=9000",
    "sample.gpu_memory_utilization=0.5",
    "sample.worker_patience_s=60",
    "train.deepspeed=zero3.json",
    "train.save_steps=3",
)
EXPERIMENTAL = {
    "run.seed=3": "run.seed",
    "speaker.path=other": "speaker.path",
    "sample.samples_per_prompt=8": "sample.samples_per_prompt",
    "sample.shard_size=8": "sample.shard_size",
    "train.learning_rate=1e-3": "train.learning_rate",
    "rewards.accuracy.mode=soft_gated": "rewards.accuracy.mode",
    "data.categories=[a]": "data.categories",
    "listener.question=Is it {coarse}?": "listener.question",
    "stages.train.nodes=2": "stages.train.world_size",
    "stages.train={gpus_per_node: 2}": "stages.train.world_size",
}


@pytest.mark.parametrize("override", CIRCUMSTANTIAL)
def test_circumstances_do_not_make_another_experiment(override: str, small: Load) -> None:
    assert to_json(small(override)) != to_json(small())
    assert config_hash(small(override)) == config_hash(small())
    assert differing_keys(small(override), small()) == []


@pytest.mark.parametrize("override", EXPERIMENTAL)
def test_what_is_computed_does(override: str, small: Load) -> None:
    here, there = small(), small(override)
    assert config_hash(here) != config_hash(there)
    assert [key for key, _, _ in differing_keys(here, there)] == [EXPERIMENTAL[override]]


def test_differing_keys_come_with_both_values(small: Load) -> None:
    found = differing_keys(small("run.seed=1"), small("run.seed=2", "speaker.lora={r: 8}"))
    assert ("run.seed", 1, 2) in found
    assert ("speaker.lora.r", None, 8) in found


def test_four_gpus_are_four_ranks_wherever_they_stand(small: Load) -> None:
    wide = small("stages.train={nodes: 4, gpus_per_node: 1}")
    tall = small("stages.train={nodes: 1, gpus_per_node: 4}")
    assert config_hash(wide) == config_hash(tall)


def test_every_circumstance_is_a_field(small: Load) -> None:
    flat = to_json(small())
    for dotted in circumstances(type(small())):
        found = flat
        for part in dotted.split("."):
            assert part in found, dotted
            found = found[part]


def test_the_json_has_the_order_of_the_schema_whatever_the_order_of_settings(small: Load) -> None:
    one = to_json(small("train.epochs=2", "run.seed=1"))
    two = to_json(small("run.seed=1", "train.epochs=2"))
    assert str(one) == str(two)
    assert list(one)[:3] == ["recipe", "run", "cluster"]


def test_the_identity_has_no_place_of_the_run(small: Load) -> None:
    assert not any(key.startswith(("cluster", "logging", "run.workspace")) for key in identity(small()))
