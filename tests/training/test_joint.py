"""A policy and a reward model in one training: each as by itself, one checkpoint, one manifest, two models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from hpc_rl import config as configs
from hpc_rl.engines.reward_model import RewardModel, TransformersJudge
from hpc_rl.engines.weights import weights_of
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.manifest import Manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.algorithms.joint import mixed
from hpc_rl.training.algorithms.judging import Objective
from hpc_rl.training.data import store
from hpc_rl.training.errors import Diverged
from tests.training import algorithms_body, algorithms_recipe
from tests.training.algorithms_recipe import PROMPTS, SAMPLES
from tests.training.conftest import REPOSITORY
from tests.training.pool import Notes, train_all
from tools import tiny_chat_model

CONFIG = REPOSITORY / "tests/training/algorithms.yaml"
SETTINGS = (
    # as many steps of the policy by itself, of the reward model by itself, and of both
    *(f"{name}.epochs=2" for name in ("grpo", "reward_model", "joint")),
    "joint.save_steps=1", "grpo.per_device_batch_size=6", "joint.per_device_batch_size=6",
    "reward_model.per_device_batch_size=4",
    "joint.alpha=1", "joint.reward_model_weight=1", "joint.reward_model.penalty=0.01", "reward_model.penalty=0.01",
    "joint.reward_model.loss=selected", "reward_model.loss=selected",
)  # fmt: skip

SHORT = ("max_length=29", "too_long=drop")
"""Leaves out all but a few questions."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the data of a round, to be copied, and beside it the model."""
    folder = tmp_path_factory.mktemp("joint")
    open_(folder / "data", tiny_chat_model.write(folder / "model"))
    assert algorithms_body.main(["--workspace", str(folder / "data"), "--round", "1"]) == 0
    return folder / "data"


def open_(root: Path, model: Path, *settings: str) -> Workspace:
    file = configs.load(CONFIG, [f"model.path={model}", *SETTINGS, *settings], {}, root, cwd=REPOSITORY)
    open_run(file, CONFIG)
    return Workspace(root)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Notes]:
    """GRPO, the reward model, and both at once, undisturbed; to be looked at."""
    root = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(data / "rounds", root / "rounds")
    ws = open_(root, data.parent / "model")
    return ws, train_all(root, ["grpo", "reward_model", "joint"])


def made(ws: Workspace, name: str = "joint") -> Manifest:
    return manifest.read(ws, 1, f"train_{name}", 0)


def weights(ws: Workspace, name: str) -> dict[str, Any]:
    return load_file(ws.checkpoint_dir(name, 1) / "model.safetensors")


@pytest.mark.parametrize(("beside", "alone"), [("joint", "grpo"), ("judge", "reward_model")])
def test_each_model_ends_as_if_it_were_trained_by_itself(
    trained: tuple[Workspace, Notes], beside: str, alone: str
) -> None:
    ws, _ = trained
    one, other = weights(ws, beside), weights(ws, alone)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.numpy() == pytest.approx(other[name].numpy(), abs=1e-6), name


def test_the_loss_is_the_sum_of_both(trained: tuple[Workspace, Notes]) -> None:
    ws, notes = trained
    policy, judge, both = (notes[name]["losses"] for name in ("grpo", "reward_model", "joint"))
    assert both == pytest.approx([a + b for a, b in zip(policy, judge, strict=True)], abs=1e-5)
    said = made(ws).metrics
    assert said["mean_policy_loss"] == pytest.approx(sum(policy) / len(policy), abs=1e-5)
    assert said["mean_reward_model_loss"] == pytest.approx(sum(judge) / len(judge), abs=1e-5)
    assert said["mean_reward_model_accuracy"] == pytest.approx(made(ws, "reward_model").metrics["mean_accuracy"])
    assert (said["reward_model"]["units"], said["reward_model"]["solutions"]) == (21, 63)


def test_with_fewer_questions_than_steps_the_reward_model_steps_only_where_it_has_some(
    data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "rounds", tmp_path / "rounds")
    short = [f"{name}.{field}" for name in ("reward_model", "joint.reward_model") for field in SHORT]
    one_by_one = ("reward_model.per_device_batch_size=1", "reward_model.gradient_accumulation_steps=1")
    small = ("joint.per_device_batch_size=4", "joint.gradient_accumulation_steps=1")
    once = ("reward_model.epochs=1", "joint.epochs=1")
    ws = open_(tmp_path, data.parent / "model", *one_by_one, *small, *once, *short)
    train_all(tmp_path, ["reward_model", "joint"])
    steps, questions = made(ws).metrics["steps"], made(ws).metrics["reward_model"]["units"]
    assert steps > questions == made(ws, "reward_model").metrics["steps"] > 1
    beside, alone = weights(ws, "judge"), weights(ws, "reward_model")
    for name, tensor in alone.items():
        assert beside[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-6), name


def test_both_models_are_in_one_manifest_and_the_next_round_finds_them(trained: tuple[Workspace, Notes]) -> None:
    ws, _ = trained
    config = load(ws.root, 1, "train_joint").config
    task = algorithms_recipe.training(config, load(ws.root, 1, "train_joint").stage.id)  # type: ignore[arg-type]
    assert task.second is not None
    of = made(ws).made_from
    for role, name in ((task.role, "weights_out"), (task.second, "weights_out_judge")):
        found = weights_of(ws, role, 1)
        assert (Path(found.base), found.adapter, found.hash) == (ws.checkpoint_dir(role.name, 1), None, of[name])
    assert of["weights_out"] != of["weights_out_judge"]
    assert {Path(output.path).parts[1] for output in made(ws).outputs} == {"joint", "judge"}


def test_the_reward_model_is_served_as_it_was_trained(trained: tuple[Workspace, Notes]) -> None:
    folder = str(trained[0].checkpoint_dir("judge", 1))
    model = RewardModel(folder, TransformersJudge(folder))
    right = {row["question"]: row["solution"] for row in algorithms_body.solutions() if row["label"]}
    pairs = [(row["question"], row["solution"]) for row in algorithms_body.solutions() if not row["label"]]
    scores = model.scores([model.encode(question, right[question]) for question, _ in pairs])
    worse = model.scores([model.encode(*pair) for pair in pairs])
    assert np.mean(np.array(scores) > np.array(worse)) > 0.9


def test_a_reward_model_whose_loss_is_no_number_ends_both_and_both_go_on(
    data: Path, trained: tuple[Workspace, Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "rounds", tmp_path / "run/rounds")
    ws = open_(tmp_path / "run", data.parent / "model")
    loss: Callable[..., Any] = Objective.__call__

    def diverging(self: Objective, found: Any, batch: Any, units: Any, step: int) -> Any:
        return loss(self, found, batch, units, step) * (float("nan") if step == 3 else 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "__call__", diverging)
        said = r"second model's loss of step 4 is not finite on rank 0, forward pass 0: q\d+.* checkpoint is kept.*-3$"
        with pytest.raises(Diverged, match=said):
            train_all(ws.root, ["joint"])
    train_all(ws.root, ["joint"])
    assert made(ws).metrics["resumed_from_step"] == 3
    for name in ("weights_out", "weights_out_judge"):
        assert made(ws).made_from[name] == made(trained[0]).made_from[name], "to the last bit"


def test_the_reward_is_a_mixture_of_correctness_and_the_score_within_its_group(data: Path) -> None:
    (file,) = (data / "rounds/round_01/data").glob("*graded.parquet")
    rollouts = store.read([file], ["correctness", "score"], SAMPLES, PROMPTS)
    right, scores = (rollouts.index[f"reward_{part}"].reshape(PROMPTS, SAMPLES) for part in ("correctness", "score"))
    normalised = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + 1e-4)
    expected = 0.3 * right + 0.7 * normalised
    assert mixed(rollouts, 0.3).rewards == pytest.approx(expected.reshape(-1), abs=1e-6)
    assert mixed(rollouts, 1.0).rewards == pytest.approx(right.reshape(-1))


def test_what_two_models_at_once_cannot_do_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(configs.ConfigError, match="the reward model learns from graded solutions"):
        open_(tmp_path / "run", data.parent / "model", "joint.rollouts=live")
    with pytest.raises(configs.ConfigError, match="two models at once are not trained with it"):
        open_(tmp_path / "run", data.parent / "model", "joint.fsdp=configs/fsdp/full_shard.json")
