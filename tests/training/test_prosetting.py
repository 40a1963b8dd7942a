"""Training in ProSetting: its data, its reference, what is only measured, rounds that teach nothing, its weights."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from hpc_rl.config.modeling import TrainedModelConfig
from hpc_rl.engines.weights import Role, weights_hash, weights_of
from hpc_rl.orchestrate.giving_up import give_up
from hpc_rl.orchestrate.job import load
from hpc_rl.run import manifest
from hpc_rl.run.manifest import Manifest
from hpc_rl.teachers import enhancing
from hpc_rl.training import logprobs
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.validation import measured
from jobs import reference
from tests.training.on_policy import Trained, noting
from tests.training.solver_run import collect, commit_data, grade, grade_by_rule, open_, pairs, trained
from tools import tiny_chat_model, tiny_sums

SUMS = tiny_sums.sums()[0]
ROLE = Role("solver", TrainedModelConfig(path="models/tiny-solver"))


def test_what_is_measured_of_pairs_follows_from_their_log_probabilities_s6() -> None:
    now, before = np.array([[-1.0, -3.0], [-2.0, -2.5]]), np.array([[-2.0, -2.0], [-1.0, -4.0]])
    first, last = measured(now, before, beta=0.5)
    x = (0.5 * (2.0 - 0.0), 0.5 * (0.5 - 3.0))
    assert first == {"loss": math.log(2), "preferred": 0.5}
    assert last["loss"] == pytest.approx(sum(-math.log(1 / (1 + math.exp(-one))) for one in x) / 2)
    assert (last["accuracy"], last["preferred"]) == (0.5, 1.0) and last["margin"] == pytest.approx(sum(x) / 2)


def test_the_references_stage_and_the_trainer_give_pairs_the_same_losses_s6(tmp_path: Path) -> None:
    """And so does a reference beside the model: the solver at the start of the round, which round 1 has trained."""
    first_round = open_(tmp_path / "first")
    commit_data(first_round, pairs(SUMS[:16]))
    trained(first_round)
    found: list[tuple[Trained, Manifest]] = []
    for name in ("pass", "stage", "live"):
        shutil.copytree(first_round.root, tmp_path / name)
        (tmp_path / name / "training_config.json").unlink()
        ws = open_(tmp_path / name, f"dpo.reference={name}", "dpo.nll_weight=0.5")
        commit_data(ws, pairs(SUMS[20:40], 2), pairs(SUMS[40:47]), round=2)
        if name == "stage":
            assert reference.main(["--workspace", str(ws.root), "--round", "2"]) == 0
            scored = manifest.Manifests(ws, 2, "reference", 5)
            assert [one.metrics["units"] for one in scored] == [5, 5, 6, 5, 6], "a share of the pairs each"
        with noting() as seen:
            made = trained(ws, 2)
        found.append((seen, made))
    first = found[0][0]
    assert len(first.losses) == 6 and max(first.grad_norms) > 1e-2
    for other, made in found[1:]:
        assert other.losses == pytest.approx(first.losses, abs=1e-6)
        assert made.metrics["validation_loss"] == pytest.approx(found[0][1].metrics["validation_loss"], abs=1e-6)


def test_shards_of_the_reference_share_a_file_of_pairs_and_are_killed_one_by_one_s6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the data's order; one that was killed is done again, those before it are not. More shards than pairs will
    do."""
    asked: list[int] = []
    whole, at = logprobs.pairs, 2

    def dies(model: Any, batch: Any) -> Any:
        asked.append(len(batch["input_ids"]) // 2)
        if len(asked) > at:
            raise KeyboardInterrupt
        return whole(model, batch)

    monkeypatch.setattr(logprobs, "pairs", dies)
    found: list[dict[str, list[float]]] = []
    for shards in (5, 9, 1):
        ws = open_(tmp_path / str(shards), "dpo.reference=stage", f"sample.shards={shards}")
        commit_data(ws, pairs(SUMS[:5]), pairs(SUMS[5:7]))
        command = ["--workspace", str(ws.root), "--round", "1"]
        if shards == 5:
            with pytest.raises(KeyboardInterrupt):
                reference.main(command)
            assert manifest.done_shards(ws, 1, "reference") == {0, 1}
            at = 100
            asked.clear()
        assert reference.main(command) == 0
        if shards == 5:
            assert asked == [2, 1, 2], "the first two are there"
        tables = [
            pq.read_table(made.path("reference.parquet")) for made in manifest.Manifests(ws, 1, "reference", shards)
        ]
        assert [len(table) for table in tables] == [(n + 1) * 7 // shards - n * 7 // shards for n in range(shards)]
        rows = [row for table in tables for row in table.to_pylist()]
        found.append({row["unit_id"]: row["logprobs"] for row in rows})
    assert list(found[0]) == list(found[1]) == list(found[2]) == [row["pair_id"] for row in pairs(SUMS[:7])]
    values = [np.array(list(one.values())) for one in found]
    assert values[0].shape == (7, 2) and (values[0] < 0).all()
    assert values[0] == pytest.approx(values[2], abs=1e-5) and values[1] == pytest.approx(values[2], abs=1e-5)


def test_pairs_of_validation_are_measured_and_not_trained_on_s5(tmp_path: Path) -> None:
    """Weights are those without them; log, TensorBoard and manifest say what was measured."""
    found = []
    for name, others in (("with", pairs(SUMS[40:47])), ("without", [])):
        ws = open_(tmp_path / name, "dpo.nll_weight=1", "dpo.epochs=4")
        commit_data(ws, pairs(SUMS[:40]), others)
        found.append(trained(ws))
    with_them, without = found
    assert with_them.made_from["weights_out"] == without.made_from["weights_out"]
    assert not any(name.startswith("validation") for name in without.metrics)
    numbers = {name: value for name, value in with_them.metrics.items() if name.startswith("validation_")}
    assert numbers["validation_pairs"] == 7 and with_them.metrics["units"] == 40
    assert numbers["validation_preferred_before"] < numbers["validation_preferred"]
    assert numbers["validation_loss"] < math.log(2) and numbers["validation_accuracy"] > 0.5
    assert numbers["validation_margin"] > 0
    shown = EventAccumulator(str(tmp_path / "with/tb/round_01/train")).Reload()
    steps = with_them.metrics["steps"]
    first, last = shown.Scalars("validation/loss")
    assert (first.step, first.value) == (0, pytest.approx(math.log(2)))
    assert (last.step, last.value) == (steps, pytest.approx(numbers["validation_loss"]))
    assert [p.step for p in shown.Scalars("train/loss")] == list(range(1, steps + 1))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_on_policy_backend_learns_from_the_graded_attempts_s10(tmp_path: Path, beta: float) -> None:
    """Five shards of four questions: one has none. A group is equal, one ungraded. With a divergence, whoever scores
    the reference (S6)."""
    found = []
    for name in ("pass", "stage") if beta else ("pass",):
        ws = open_(tmp_path / name, "backend=rloo", f"rloo.beta={beta}", f"rloo.reference={name}")
        collect(ws, SUMS[:4])
        grade(ws, {0: [1.0, 0.0, 0.0, 1.0], 1: [0.0] * 4, 2: [None] * 4, 3: [None, 1.0, 0.0, 0.0]})
        if name == "stage":
            assert reference.main(["--workspace", str(ws.root), "--round", "1"]) == 0
        with noting() as seen:
            made = trained(ws)
        found.append((seen, made))
    (seen, made), other = found[0], found[-1]
    counts = {name: made.metrics[name] for name in ("samples", "left_out", "groups", "dropped_groups", "equal_groups")}
    assert counts == {"samples": 16, "left_out": 5, "groups": 4, "dropped_groups": 1, "equal_groups": 1}
    assert made.metrics["used_samples"] == 7 and made.metrics["mean_reward"] == pytest.approx(3 / 11)
    assert seen.grad_norms[0] > 1e-2 and made.made_from["weights_out"] != made.made_from["weights"]
    assert other[0].losses == pytest.approx(seen.losses, abs=1e-6)


def test_attempts_of_a_round_lift_the_solver_s10(tmp_path: Path) -> None:
    """Sums that it was not asked about, after six epochs over the attempts at 60 others."""
    small = ("learning_rate=1e-4", "epochs=6", "per_device_batch_size=64", "gradient_accumulation_steps=1")
    betas = ("adam_betas=[0.9, 0.999]", "weight_decay=0")
    ws = open_(
        tmp_path, "backend=rloo", "sample.samples_per_prompt=8", *(f"rloo.{one}" for one in (*small, *betas))
    )  # fmt: skip
    collect(ws, SUMS[:60])
    grade_by_rule(ws, SUMS[:60])
    trained(ws)
    others, models = tiny_sums.sums()[1], ("models/tiny-solver", ws.checkpoint_dir("solver", 1))
    before, after = (tiny_sums.accuracy(AutoModelForCausalLM.from_pretrained(one), others) for one in models)
    assert before < 0.2 and after > 0.35, (before, after)


def test_the_question_generator_learns_variants_by_their_weight_s17(tmp_path: Path) -> None:
    """Two rounds, each from the weights of the one before; a variant of weight 0 is as good as none."""
    model = tiny_chat_model.write(tmp_path / "model")
    settings = (f"generator.path={model}", "generator.dtype=float32", "generator_training.learning_rate=1e-2")

    def texts(weights: tuple[float, ...]) -> list[dict[str, object]]:
        return [
            {
                "text_id": f"t{number}", "weight": weight,
                "prompt": list(enhancing.messages("harder", f"What is {number} + 2?", str(number + 2), None)),
                "completion": enhancing.completion(enhancing.Variant("What is 21 + 3?", f"It is {number}.", "24")),
            }
            for number, weight in enumerate(weights)
        ]  # fmt: skip

    found = []
    for name, weights in (("all", (1.0, 0.25, 0.9)), ("none", (1.0, 0.25, 0.0))):
        ws = open_(tmp_path / name, *settings)
        for round in (1, 2):
            commit_data(ws, [], texts=texts(weights), round=round)
            found.append(trained(ws, round, "train_generator"))
    (first, second), (other, _) = found[:2], found[2:]
    assert first.made_from["weights"] == weights_hash(model) != first.made_from["weights_out"]
    assert second.made_from["weights"] == first.made_from["weights_out"] and second.metrics["units"] == 3
    assert second.metrics["mean_loss"] < first.metrics["mean_loss"]
    assert other.metrics["mean_loss"] < first.metrics["mean_loss"], "its loss does not count, its tokens do"


def test_a_round_that_teaches_nothing_leaves_the_weights_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without pairs (S5) nothing is trained; the next round goes on from the last weights that there are (S8)."""
    ws = open_(tmp_path / "run")
    commit_data(ws, pairs(SUMS[:16]))
    first = trained(ws)
    commit_data(ws, [], pairs(SUMS[16:18]), round=2)
    with caplog.at_level(logging.WARNING):
        kept = trained(ws, 2)
    assert "nothing to learn in round 2: no pair is left to train on; 2 are there for validation" in caplog.text
    assert kept.outputs == () and kept.metrics["steps"] == 0 and not ws.checkpoint_dir("solver", 2).exists()
    assert kept.made_from["nothing_to_learn"].startswith("no pair is left") and kept.made_from["trained_round"] == 1
    assert weights_of(ws, ROLE, 2) == weights_of(ws, ROLE, 1)
    commit_data(ws, pairs(SUMS[20:36], 3), round=3)
    last = trained(ws, 3)
    assert last.made_from["weights"] == kept.made_from["weights_out"] == first.made_from["weights_out"]
    assert last.made_from["weights_out"] != first.made_from["weights_out"]


def test_attempts_that_are_all_alike_leave_the_weights_as_they_were_s10(tmp_path: Path) -> None:
    ws = open_(tmp_path, "backend=rloo")
    collect(ws, SUMS[:4])
    grade(ws, {group: [0.0] * 4 for group in range(4)})
    made = trained(ws)
    assert "rewards are equal within each of the 4 groups" in made.made_from["nothing_to_learn"]
    assert weights_of(ws, ROLE, 1) == weights_of(ws, ROLE, 0)


def test_after_a_training_that_was_given_up_the_weights_before_it_stand(tmp_path: Path) -> None:
    ws = open_(tmp_path)
    commit_data(ws, pairs(SUMS[:16]))
    trained(ws)
    for round, stands in ((2, 1), (3, 2)):
        given_up = {"given_up": "GPU on fire", "trained_round": stands}
        manifest.write(ws, Manifest(round, "train", 0, outputs=(), made_from=given_up))
    assert weights_of(ws, ROLE, 3) == weights_of(ws, ROLE, 1) != weights_of(ws, ROLE, 0)


def test_a_reference_that_was_given_up_is_named_by_the_training(tmp_path: Path) -> None:
    ws = open_(tmp_path, "dpo.reference=stage")
    commit_data(ws, pairs(SUMS[:16]))
    job = load(ws.root, 1, "reference")
    give_up(ws, job.config, job.stage, "GPU on fire")
    with pytest.raises(UnusableData, match=r"reference of round 1 was given up \(GPU on fire\).*dpo.reference to pass"):
        trained(ws)


def test_every_rounds_weights_are_a_plain_folder_and_are_kept_s8(tmp_path: Path) -> None:
    """With adapters too, merged: transformers alone loads each, and it is not the one before."""
    lora = "solver.lora={r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"
    ws = open_(tmp_path, lora, "dpo.export=merged", "dpo.learning_rate=1e-2")
    models = [AutoModelForCausalLM.from_pretrained("models/tiny-solver")]
    for round in (1, 2):
        commit_data(ws, pairs(SUMS[20 * round : 20 * round + 16], round), round=round)
        made = trained(ws, round)
        folder = ws.checkpoint_dir("solver", round)
        assert not (folder / "adapter_config.json").exists() and (folder / "tokenizer.json").exists()
        assert weights_hash(folder) == made.made_from["weights_out"] == weights_of(ws, ROLE, round).hash
    for round in (1, 2):
        models.append(AutoModelForCausalLM.from_pretrained(ws.checkpoint_dir("solver", round)))
    values = [model.state_dict() for model in models]
    assert values[0].keys() == values[1].keys() == values[2].keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(values[0][name], values[1][name]) and not torch.equal(values[1][name], values[2][name])
