"""GPUs that the engines of a stage ask for and it does not have are found before anything is submitted."""

from __future__ import annotations

import pytest

from hpc_rl.config.errors import ConfigError
from tests.config.conftest import Load

NODE = "stages.sample={gpus_per_node: 8, ranks_per_node: 1}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["stages.sample.gpus_per_node=1", "sample.data_parallel_size=8"],
            "sample.data_parallel_size: 8 engines cannot share 1 GPU equally",
        ),
        (
            ["stages.sample.gpus_per_node=1", "sample.tensor_parallel_size=4"],
            "sample.tensor_parallel_size: one engine of 4 GPUs, but the task has 1",
        ),
        (
            ["stages.sample.gpus_per_node=1", "sample.gpu_ids=[0, 5]", "sample.data_parallel_size=2"],
            r"sample.gpu_ids: \[5\] of \[0, 5\], but the task has 1 GPU \(0\)",
        ),
        ([NODE, "sample.data_parallel_size=3"], "3 engines cannot share 8 GPUs equally"),
        (
            [NODE, "sample.data_parallel_size=4", "sample.tensor_parallel_size=4"],
            r"4 engines of 4 GPUs each, but the task has 8\n.* gpus_per_node to 16",
        ),
        (
            ["sample.tensor_parallel_size=4", "stages.evaluate.gpus_per_node=1"],
            r"stages.evaluate.gpus_per_node: 1, but its engine takes sample.tensor_parallel_size = 4",
        ),
        (
            [NODE, "sample.tensor_parallel_size=2", "sample.data_parallel_size=3"],
            "sample.data_parallel_size: 3 engines of 2 GPUs leave 2 of the task's 8 idle\n.* expected: 4",
        ),
        (
            [NODE, "sample.data_parallel_size=2", "sample.engine=transformers"],
            r"2 engines of 1 GPU \(transformers uses one each\) leave 6 of the task's 8 idle",
        ),
        (["stages.sample.gpus_per_node=8", "sample.data_parallel_size=8"], "ranks_per_node: 1 and sample.data_paral"),
    ],
)
def test_engines_that_ask_for_more_gpus_than_there_are(small: Load, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(*settings)


@pytest.mark.parametrize(
    "settings",
    [
        [NODE, "sample.data_parallel_size=8"],
        [NODE, "sample.data_parallel_size=2", "sample.tensor_parallel_size=4"],
        [NODE, "sample.data_parallel_size=8", "sample.engine=transformers"],
        [NODE, "sample.gpu_ids=[5, 7]", "sample.data_parallel_size=2"],
        ["sample.data_parallel_size=4"],  # no GPUs are asked for: engines on CPUs, or on what the machine has
        ["sample.gpu_ids=[5, 7]", "sample.data_parallel_size=2"],
        [
            NODE,
            "sample={data_parallel_size: 2, tensor_parallel_size: 4}",
            "stages.evaluate.gpus_per_node=1",
            "evaluate.engine=transformers",
        ],
    ],
)
def test_engines_that_get_what_they_ask_for(small: Load, settings: list[str]) -> None:
    assert small(*settings).sample


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ([NODE], "one engine on 8 GPUs, as"),
        ([NODE, "sample.data_parallel_size=2"], "2 engines on 4 GPUs each, as"),
        ([NODE, "sample.gpu_ids=[0, 1]"], "one engine on 2 GPUs, as"),
    ],
)
def test_gpus_that_work_as_one_without_being_told_so_are_worth_a_note(
    small: Load, settings: list[str], note: str
) -> None:
    (said,) = small(*settings).notes()
    assert said.startswith(f"stages.sample: {note} sample.tensor_parallel_size is null")
    given = 2 if "gpu_ids" in settings[-1] else 8
    assert said.endswith(f"For an engine on each GPU: sample.data_parallel_size = {given}")
    assert not [*small(*settings, f"sample.data_parallel_size={given}").notes()]


@pytest.mark.parametrize(
    "settings",
    [
        [NODE, "sample.tensor_parallel_size=8"],
        ["stages.sample.gpus_per_node=1"],
        ["sample.data_parallel_size=4"],
        [NODE, "sample.data_parallel_size=8", "sample.engine=transformers"],
    ],
)
def test_what_is_said_or_has_one_gpu_needs_no_note(small: Load, settings: list[str]) -> None:
    assert not [*small(*settings).notes()]
