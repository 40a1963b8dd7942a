"""GRPO and RLOO on texts: stored rollouts give the losses of live ones, and what each setting changes."""

from __future__ import annotations

import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_rl import config as configs
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.errors import NothingToLearn
from hpc_rl.training.reporting.reporter import Reporter
from jobs import reference
from tests.training.on_policy import Sample, Trained, commit, config_of, draw, graded, open_, train
from tools import tiny_sums

LIVE = ("rollouts=live", "live_max_steps=2", "beta=0.05", "drop_equal_groups=false")
STORED = ("beta=0.05", "drop_equal_groups=false")
BNPO = "grpo grpo.loss_type=bnpo"
KINDS = ["grpo", "grpo grpo.loss_type=grpo", "grpo grpo.loss_type=dr_grpo grpo.scale_rewards=none", "rloo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing."""
    return tiny_sums.save(tiny_sums.untaught(), tmp_path_factory.mktemp("untaught") / "model")


def settings(kind: str, *of: str) -> list[str]:
    """`kind` is an algorithm and further settings; `of` are settings of its section."""
    algorithm, *more = kind.split()
    return [f"algorithm={algorithm}", *more, *(f"{algorithm}.{one}" for one in of)]


def samples_of(live: Trained, root: Path, model: Path) -> list[Sample]:
    """What a live training has sampled, as a sampling job would have written it."""
    speaks, batch = tiny_sums.tokenizer(), live.batches[0]
    said = []
    for number in range(len(batch["prompt_ids"])):
        prompt, tokens = (
            batch[f"{name}_ids"][number][batch[f"{name}_mask"][number].bool()].tolist()
            for name in ("prompt", "completion")
        )
        first, second = speaks.decode(prompt).replace(" ", "").rstrip("=").split("+")
        said.append(((int(first), int(second)), tuple(tokens)))
    return graded(config_of(open_(root, model)), said)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_rollouts_have_the_losses_of_live_ones(model: Path, tmp_path: Path, kind: str) -> None:
    """Two passes over the same samples, with a KL term: the second has ratios other than 1."""
    live = train(open_(tmp_path / "live", model, *settings(kind, *LIVE)))
    ws = open_(tmp_path / "stored", model, *settings(kind, *STORED))
    commit(ws, samples_of(live, tmp_path / "samples", model))
    stored = train(ws)
    assert len(live.losses) == len(stored.losses) == 2
    assert stored.losses == pytest.approx(live.losses, abs=1e-5)
    assert stored.grad_norms == pytest.approx(live.grad_norms, rel=1e-4)
    assert abs(live.losses[1] - live.losses[0]) > 1e-4 and live.grad_norms[0] > 1e-3


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Four groups of four, whose rewards differ within each."""
    samples = draw(open_(tmp_path_factory.mktemp("drawn"), model))
    return [replace(one, reward=(0.0, n % 4 / 3)) for n, one in enumerate(samples)]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_different_sizes_are_one_step(model: Path, tmp_path: Path, drawn: list[Sample], kind: str) -> None:
    """Seven samples in passes of 4 and 3 have the gradient of all seven in one, whatever a loss is divided by."""
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        shape = (f"per_device_batch_size={size}", f"gradient_accumulation_steps={accumulation}", "passes=1")
        ws = open_(tmp_path / f"{size}", model, *settings(kind, *shape), "sample.prompts_per_round=2")
        commit(ws, [*drawn[:7], replace(drawn[7], reward=None)])
        found.append(train(ws))
    whole, cut = found
    assert [len(one.losses) for one in found] == [1, 2]
    assert cut.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4) and whole.grad_norms[0] > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, BNPO])
def test_a_pass_without_samples_changes_nothing(model: Path, tmp_path: Path, drawn: list[Sample], kind: str) -> None:
    """Seven samples in seven passes, and in eight, of which one has only a filler."""
    found = []
    for accumulation in (7, 8):
        shape = ("per_device_batch_size=1", f"gradient_accumulation_steps={accumulation}", "passes=1")
        size = "sample.samples_per_prompt=" + ("7" if accumulation == 7 else "4")
        ws = open_(tmp_path / f"{accumulation}", model, *settings(kind, *shape), "sample.prompts_per_round=2", size)
        commit(ws, [*drawn[:7], replace(drawn[7], reward=None)])
        found.append(train(ws))
    assert [len(one.losses) for one in found] == [7, 8]
    assert found[1].grad_norms == pytest.approx(found[0].grad_norms, rel=1e-4)


def test_with_merged_weights_the_divergence_is_to_the_initial_model_too(
    model: Path, tmp_path: Path, drawn: list[Sample]
) -> None:
    """The second round's adapter lies on the first one's weights, so the policy without it is not the initial model."""
    found = []
    for name in ("pass", "live"):
        more = ("beta=0.5", f"reference={name}", "export=merged")
        lora = "model.lora={r: 4, target_modules: [q_proj, v_proj]}"
        ws = open_(tmp_path / name, model, "run.rounds=2", lora, *settings("grpo", *more))
        commit(ws, drawn)
        commit(ws, drawn, round=2, weights=train(ws).weights)
        found.append(train(ws, round=2))
    assert found[1].losses == pytest.approx(found[0].losses, abs=1e-6)
    assert found[0].metrics["mean_kl"] > 1e-4


@pytest.mark.parametrize(("kind", "accumulation"), [("grpo", 1), ("grpo", 2), ("rloo", 2)])
def test_live_rollouts_go_on_where_they_were_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, accumulation: int
) -> None:
    """Left between two passes over the same completions: the second uses them. Two epochs, in different orders."""
    of = [*settings(kind, "rollouts=live", "live_max_steps=8", "save_steps=1000")]
    of += ["sample.max_tokens=3", f"sample.prompts_per_round={8 * accumulation}"]
    of.append(f"{kind}.gradient_accumulation_steps={accumulation}")
    whole = open_(tmp_path / "undisturbed", model, *of)
    undisturbed = train(whole)
    ws = open_(tmp_path / "left", model, *of)
    told = Reporter.on_step_end

    def tell(reporter: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        told(reporter, args, state, control, **more)
        if state.global_step == 2:  # which is heard in the third step
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "on_step_end", tell)
    with pytest.raises(SystemExit):
        train(ws)
    monkeypatch.setattr(Reporter, "on_step_end", told)
    again = train(ws)
    assert again.metrics["resumed_from_step"] == 3
    assert any(undisturbed.losses[3 * accumulation :]) and again.losses == undisturbed.losses[3 * accumulation :]
    assert again.weights == undisturbed.weights
    assert again.metrics["samples"] == undisturbed.metrics["samples"]
    judged = [manifest.read(one, 1, "train", 0).path("judged.txt").read_text() for one in (ws, whole)]
    assert judged[0] == judged[1], "the first attempt's verdicts too"


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_groups_with_equal_rewards_are_left_out_and_counted(
    model: Path, tmp_path: Path, drawn: list[Sample], kind: str
) -> None:
    equal = [replace(one, reward=(1.0, 0.5)) for one in drawn[:4]]
    ws = open_(tmp_path / "some", model, *settings(kind))
    commit(ws, [*equal, *drawn[4:]])
    found = train(ws).metrics
    assert (found["equal_groups"], found["used_samples"], found["samples"]) == (1, 12, 16)
    assert found["mean_reward"] == pytest.approx((1.25 + 3 * 0.25) / 4), "of the whole round"
    assert found["length_max"] >= found["length_median"] > 6
    ws = open_(tmp_path / "all", model, *settings(kind))
    commit(ws, equal)
    with pytest.raises(NothingToLearn, match=r"each of the 1 groups.* mean reward 1\.25, exact 1, digits 0\.5"):
        train(ws)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_what_the_sampler_did_otherwise_is_made_up_for(
    model: Path, tmp_path: Path, drawn: list[Sample], correction: str
) -> None:
    """In the first step π = π_old, so the loss is −Σ w A / tokens. Here the sampler is off by known ratios."""
    ratios = [(4.0, 0.5, 1.0, 0.8)[: len(one.token_ids)] if n % 2 else (1.1,) * 4 for n, one in enumerate(drawn)]
    told = [
        replace(one, logprobs=tuple(p - math.log(r) for p, r in zip(one.logprobs, of, strict=False)))
        for one, of in zip(drawn, ratios, strict=True)
    ]
    ws = open_(tmp_path, model, "grpo.passes=1", f"grpo.correction={correction}", "grpo.correction_cap=1.5")
    commit(ws, told)
    rewards = np.array([0.0, 1 / 6, 1 / 3, 1 / 2])
    worth = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    total = 0.0
    for n, (one, of) in enumerate(zip(drawn, ratios, strict=True)):
        own = np.array(of[: len(one.token_ids)])
        whole = float(own.prod())
        weights = own.clip(max=1.5) if correction == "truncate" else np.full(len(own), whole * (whole <= 1.5))
        total -= float(weights.sum() * worth[n % 4])
    found = train(ws)
    assert found.losses[0] == pytest.approx(total / sum(len(one.token_ids) for one in drawn), abs=1e-5)
    assert found.metrics["first_step_logprob_difference_max"] == pytest.approx(math.log(4), abs=1e-4)
    tokens = sum(len(one.token_ids) for one in drawn)
    beyond = 8 / tokens if correction == "truncate" else 0.5  # every other sample: its first token, or all of it
    assert found.metrics["mean_beyond_cap"] == pytest.approx(beyond, rel=1e-3)
    assert 0 < found.metrics["mean_importance_ratio"] < 1.5


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_divergence_is_to_the_initial_model_whoever_scores_it(
    model: Path, tmp_path: Path, drawn: list[Sample], kind: str
) -> None:
    """In the second round: the weights that it begins with are others."""
    found = []
    for name in ("pass", "stage", *(["live"] if kind == "grpo" else [])):
        ws = Workspace(tmp_path / name)
        if found:
            shutil.copytree(tmp_path / "first", ws.root)
            (ws.root / "training_config.json").unlink()
        open_(ws.root, model, "run.rounds=2", *settings(kind, "beta=0.5", f"reference={name}"))
        if not found:
            commit(ws, drawn)
            weights = train(ws).weights
            shutil.copytree(ws.root, tmp_path / "first")
        commit(ws, drawn, round=2, weights=weights)
        if name == "stage":
            assert reference.main(["--workspace", str(ws.root), "--round", "2"]) == 0
        found.append(train(ws, round=2))
    for one in found[1:]:
        assert one.losses == pytest.approx(found[0].losses, abs=1e-6)
        assert one.grad_norms == pytest.approx(found[0].grad_norms, rel=1e-4)
    batch, said = found[0].batches[0], [(one.sum, one.token_ids) for one in drawn]
    places = [int(unit.split("-")[0]) * 4 + int(unit.split("-")[1]) for unit in found[0].units[0]]
    initial = [torch.tensor(drawn[place].logprobs) for place in places]
    if kind == "grpo":
        for row, expected in zip(batch["ref_per_token_logps"], initial, strict=True):
            assert torch.allclose(row[: len(expected)], expected, atol=1e-5)
        return
    now = graded(config_of(ws), said, ws.checkpoint_dir("model", 1))
    divergence = np.array([sum(one.logprobs) - sum(was.logprobs) for one, was in zip(now, drawn, strict=True)])
    per_token = divergence.sum() / sum(len(one.token_ids) for one in drawn)
    assert found[0].metrics["mean_kl"] == pytest.approx(per_token, rel=1e-3) and per_token > 1e-4
    rewards = np.array([one.reward[0] + 0.5 * one.reward[1] for one in drawn if one.reward]) - 0.5 * divergence
    groups = rewards.reshape(4, 4)
    worth = (groups - (groups.sum(1, keepdims=True) - groups) / 3).ravel()
    assert np.abs(divergence).max() > 1e-3
    assert batch["advantages"].numpy() == pytest.approx(worth[places], abs=1e-5)


def test_what_a_config_may_not_ask_for(model: Path, tmp_path: Path) -> None:
    for kind, wrong, said in (
        ("rloo", ("beta=0.1", "reference=live"), "rloo.reference.*known first.*pass or stage"),
        ("grpo", ("rollouts=live", "reference=stage"), "grpo.reference.*do not exist yet"),
        ("grpo", ("rollouts=live", "correction=mask"), "grpo.correction.*one engine does both"),
    ):
        with pytest.raises(configs.ConfigError, match=f"(?s){said}"):
            open_(tmp_path, model, *settings(kind, *wrong))


def test_groups_that_are_equal_once_clipped_are_left_out(model: Path, tmp_path: Path, drawn: list[Sample]) -> None:
    """Of the rewards 2.5 and 4.5 the clip makes 2; those of the other groups stay between."""
    high = [replace(one, reward=(1.0 + n % 2, 3.0 + 2 * (n % 2))) for n, one in enumerate(drawn[:4])]
    ws = open_(tmp_path, model, *settings("rloo", "reward_clip=2"))
    commit(ws, [*high, *drawn[4:]])
    found = train(ws).metrics
    assert (found["equal_groups"], found["used_samples"]) == (1, 12)
    assert found["mean_reward"] == pytest.approx((3.5 + 3 * 0.25) / 4), "of the rewards as they were"
