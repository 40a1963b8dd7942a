"""Settings of sampling that depend on each other, or that only a node can resolve."""

from __future__ import annotations

import pytest

from hpc_rl.config.errors import ConfigError
from hpc_rl.config.identity import to_json
from hpc_rl.config.loader import from_json
from hpc_rl.engines.memory import most_notches, plan
from tests.config.conftest import Load


def test_an_engine_may_share_a_gpu_whatever_the_usual_least_share_is(small: Load) -> None:
    config = small("sample.gpu_memory_utilization=0.4", "sample.max_num_seqs=16")
    assert from_json(to_json(config), "training_config.json") == config
    assert plan(config.sample, 2, memory_gib=64).gpu_memory_utilization == 0.4
    assert most_notches(config.sample, has_gpus=True) == 0
    usual = small().sample
    assert [plan(usual, n, memory_gib=64).gpu_memory_utilization for n in (0, 1, 5)] == [0.8, 0.7, 0.5]
    with pytest.raises(ConfigError, match=r"min_gpu_memory_utilization: 0.5 is above gpu_memory_utilization"):
        small("sample.gpu_memory_utilization=0.4", "sample.min_gpu_memory_utilization=0.5")
