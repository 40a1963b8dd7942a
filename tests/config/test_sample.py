"""Settings of sampling that depend on each other, or that only a node can resolve."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl.config.errors import ConfigError
from hpc_rl.config.identity import to_json
from hpc_rl.config.loader import from_json
from hpc_rl.engines.memory import most_notches, plan
from hpc_rl.engines.node_disk import node_folder
from tests.config.conftest import Load


def test_an_engine_may_share_a_gpu_whatever_the_usual_least_share_is(small: Load) -> None:
    config = small("sample.gpu_memory_utilization=0.4", "sample.max_num_seqs=16")
    assert from_json(to_json(config), "training_config.json") == config
    assert plan(config.sample, 2, memory_gib=64).gpu_memory_utilization == 0.4
    assert most_notches(config.sample, "vllm", has_gpus=True) == 0
    usual = small().sample
    assert [plan(usual, n, memory_gib=64).gpu_memory_utilization for n in (0, 1, 5)] == [0.8, 0.7, 0.5]
    with pytest.raises(ConfigError, match=r"min_gpu_memory_utilization: 0.5 is above gpu_memory_utilization"):
        small("sample.gpu_memory_utilization=0.4", "sample.min_gpu_memory_utilization=0.5")


def test_variables_of_a_chat_template_are_names_that_no_phase_sets_by_itself(small: Load) -> None:
    config = small("speaker.chat_template_kwargs={enable_thinking: false}")
    assert from_json(to_json(config), "training_config.json") == config
    with pytest.raises(ConfigError, match=r"chat_template_kwargs.tokenize: every phase sets this by itself"):
        small("speaker.chat_template_kwargs={tokenize: true}")
    with pytest.raises(ConfigError, match=r"chat_template_kwargs.1: no name of a variable"):
        small("speaker.chat_template_kwargs={1: true}")


@pytest.mark.parametrize(
    "folder", ["scratch/x", "~guest/x", "''", ".", "TMPDIR", "$", "${TMPDIR:-/tmp}", "/local/${USER"]
)
def test_a_folder_that_no_node_could_resolve(small: Load, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"sample.stage_to: .* is no absolute path"):
        small(f"sample.stage_to={folder}")


@pytest.mark.parametrize("folder", ["/local/$USER", "$TMPDIR", "${TMPDIR}", "$A$B", "${SCRATCH}/x y/$JOB", "~/x", "/"])
def test_a_folder_that_a_node_resolves(
    small: Load, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_to = small(f"sample.stage_to={folder}").sample.stage_to
    assert stage_to == folder
    if folder in ("/", "/local/$USER"):
        return
    environ = dict.fromkeys(("TMPDIR", "SCRATCH", "A"), str(tmp_path)) | {"B": "b", "JOB": "7"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert node_folder(stage_to, environ).is_relative_to(tmp_path.parent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sample.max_tries_per_task=8"], "max_tries_per_task: 8, but with accept: all every completion counts"),
        (
            ["sample.max_tries_per_task=3", "sample.accept=well_formed"],
            "max_tries_per_task: 3 for samples_per_prompt = 4",
        ),
        (
            ["sample.long_prompts=truncate_left"],
            "long_prompts: truncate_left, but every prompt of this game has a picture",
        ),
    ],
)
def test_a_setting_that_would_do_nothing_or_never_work(small: Load, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"sample.{message}"):
        small(*settings)
