"""The GRPO update on stored rollouts, in this process: the right samples, formula, numbers and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from hpc_rl import config as configs
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.run import atomic, manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.errors import UnusableData
from jobs import train
from tests.training.conftest import PARTS, NewRun


def run(ws: Workspace, round: int = 1) -> Any:
    """Train in this process; the manifest."""
    assert train.main(["--workspace", str(ws.root), "--round", str(round)]) == 0
    return manifest.read(ws, round, "train", 0)


def weights(ws: Workspace, round: int = 1) -> dict[str, torch.Tensor]:
    folder = ws.checkpoint_dir("speaker", round)
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def steps(ws: Workspace) -> list[dict[str, float]]:
    """What TensorBoard shows of round 1, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ws.tb_dir / "round_01" / "train")).Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag.removeprefix("train/")] = event.value
    return [found[step] for step in sorted(found)]


def config_of(ws: Workspace) -> LewisConfig:
    config = configs.from_json(atomic.read_json(ws.config_path))
    assert isinstance(config, LewisConfig)
    return config


@pytest.fixture
def trained(plain: Workspace) -> tuple[Workspace, Any]:
    """A plain run and the manifest of its training."""
    return plain, manifest.read(plain, 1, "train", 0)


def test_the_first_step_meets_the_policy_that_sampled(trained: tuple[Workspace, Any]) -> None:
    metrics = trained[1].metrics
    (first,) = metrics["first_step_by_rank"]
    assert first["logprob_difference_max"] < 1e-4 and first["clipped"] == 0 and first["tokens"] > 50
    assert first["ratio_min"] == pytest.approx(1, abs=1e-4) and first["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["first_step_clip_ratio"] == 0 and metrics["steps"] == 6 and metrics["samples"] == 48
    assert metrics["mean_clip_ratio"] > 0, "later steps move the policy"


def test_it_would_be_noticed_if_rollouts_met_other_pictures(new_run: NewRun) -> None:
    ws = new_run()
    path = ws.dataset_dir(0) / "train.parquet"
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    table = table.set_column(table.column_names.index("image"), "image", [images[5:] + images[:5]])
    pq.write_table(table, path)
    stored = manifest.manifest_path(ws, 0, "dataset", 0)
    data = atomic.read_json(stored)
    for output in data["outputs"]:
        if output["path"].endswith("train.parquet"):
            output.update(bytes=path.stat().st_size, sha256=manifest.sha256_of(path))
    atomic.write_json(stored, data)
    assert run(ws).metrics["first_step_logprob_difference_max"] > 0.02


def test_loss_and_gradient_are_those_of_the_formula(new_run: NewRun, speaker: Path) -> None:
    """DAPO-normalised GRPO with k3 KL by hand, against the first step of the trainer."""
    ws = new_run("train.beta=0.3", "speaker.lora=null", "train.warmup_steps=0", "train.lr_scheduler=constant",
                 "train.learning_rate=1e-6")  # fmt: skip
    run(ws)
    first = steps(ws)[0]

    from transformers import AutoModelForImageTextToText

    from hpc_rl.data.images import load_image
    from hpc_rl.data.lewis import read_rows
    from hpc_rl.engines.base import BAN_BIAS, banned_ids
    from hpc_rl.engines.loading import load_processor
    from hpc_rl.training.data import plan, store
    from hpc_rl.training.data.plan import Shape
    from hpc_rl.training.data.rollouts import advantages

    config = config_of(ws)
    files = [manifest.read(ws, 1, "grade", shard).path("graded.parquet") for shard in range(2)]
    rollouts = store.read(files, PARTS, 4, 12).without_equal_groups()
    made = plan.make(rollouts, Shape(1, 1, 8), epochs=1, run_seed=0, round=1)
    worth = advantages(rollouts.rewards, rollouts.starts)
    rows = {row.id: row for row in read_rows(ws.dataset_dir(0) / "train.parquet")}
    processor = load_processor(speaker, config.speaker.min_pixels, config.speaker.max_pixels)
    model = AutoModelForImageTextToText.from_pretrained(speaker, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    bias = torch.zeros(model.config.get_text_config().vocab_size)
    bias[list(banned_ids(speaker, processor.tokenizer))] = BAN_BIAS
    items = made[0].items
    tokens = sum(len(item.unit.token_ids) for item in items)
    total = torch.zeros(())
    for item in items:
        rollout = item.unit
        ids = torch.tensor(np.concatenate([rollout.prompt_ids, rollout.token_ids]))[None].long()
        image = load_image(ws.images_dir / rows[rollout.row_id].image)
        made_pixels = processor.image_processor(images=[image], return_tensors="pt")
        types = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=types, **made_pixels).logits[
            0, len(rollout.prompt_ids) - 1 : -1
        ]
        now = (logits + bias).log_softmax(-1).gather(1, torch.tensor(rollout.token_ids).long()[:, None])[:, 0]
        ratio = (now - torch.tensor(rollout.logprobs)).exp()
        clipped = ratio.clamp(0.8, 1.2)
        reference = now.detach()  # the initial model is the policy of the first step
        kl = (reference - now).exp() - (reference - now) - 1
        loss = -torch.minimum(ratio * worth[item.place], clipped * worth[item.place]) + 0.3 * kl
        total = total + loss.sum() / tokens
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert first["loss"] == pytest.approx(total.item(), abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert steps(ws)[-1]["kl"] > 0


def test_accumulated_batches_are_one_step(trained: tuple[Workspace, Any], new_run: NewRun) -> None:
    ws = new_run("train.per_device_batch_size=2", "train.gradient_accumulation_steps=4")
    assert run(ws).metrics["steps"] == 6
    ours, whole = weights(ws), weights(trained[0])
    assert all((ours[name] - whole[name]).abs().max() < 1e-4 for name in whole)
    assert [s["grad_norm"] for s in steps(ws)[:2]] == pytest.approx(
        [s["grad_norm"] for s in steps(trained[0])[:2]], rel=1e-3
    )


def test_passes_train_again_on_the_same_samples(new_run: NewRun) -> None:
    ws = new_run("train.passes=2", "train.warmup_steps=0", "train.lr_scheduler=constant", "train.learning_rate=3e-4")
    assert run(ws).metrics["steps"] == 12
    found = steps(ws)
    assert all(found[n]["reward"] == found[n + 1]["reward"] for n in range(0, 12, 2))
    assert found[0]["ratio/max"] == pytest.approx(1, abs=1e-4) and found[1]["ratio/max"] > 1.001


def test_left_out_samples_and_short_steps_train(new_run: NewRun, trained: tuple[Workspace, Any]) -> None:
    files = [manifest.read(trained[0], 1, "grade", shard).path("graded.parquet") for shard in range(2)]
    rows = [row for file in files for row in pq.read_table(file, columns=["sample_id", "group"]).to_pylist()]
    gone = [rows[0]["sample_id"], *[row["sample_id"] for row in rows if row["group"] == 3][:3]]
    metrics = run(new_run(left_out=gone)).metrics
    assert (metrics["left_out"], metrics["dropped_groups"], metrics["short_groups"]) == (4, 1, 1)
    assert metrics["used_samples"] == 43 and metrics["steps"] == 6
    assert metrics["first_step_logprob_difference_max"] < 1e-4


def test_the_next_round_goes_on_with_the_adapter(plain_second: Workspace) -> None:
    ws = plain_second
    made = manifest.read(ws, 2, "train", 0)
    assert made.metrics["first_step_logprob_difference_max"] < 1e-4, "the adapter that sampled is the one that trains"
    assert made.made_from["weights"] == manifest.read(ws, 1, "train", 0).made_from["weights_out"]
    first, second = weights(ws, 1), weights(ws, 2)
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)


def test_the_adapter_loads_as_peft_documents_it(trained: tuple[Workspace, Any], speaker: Path) -> None:
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageTextToText

    folder = trained[0].checkpoint_dir("speaker", 1)
    config = PeftConfig.from_pretrained(str(folder))
    assert config.base_model_name_or_path == str(speaker) and config.inference_mode
    base = AutoModelForImageTextToText.from_pretrained(config.base_model_name_or_path)
    model = PeftModel.from_pretrained(base, str(folder))
    assert sum("lora" in name for name, _ in model.named_parameters()) == len(weights(trained[0]))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}, "nothing pickled"
    made = trained[1]
    assert {Path(o.path).name for o in made.outputs} == {path.name for path in folder.iterdir()}


def test_full_training_freezes_vision_and_writes_a_whole_model(new_run: NewRun, speaker: Path) -> None:
    from transformers import AutoModelForImageTextToText

    ws = new_run("speaker.lora=null", "train.learning_rate=3e-4")
    made = run(ws)
    folder = ws.checkpoint_dir("speaker", 1)
    old = AutoModelForImageTextToText.from_pretrained(speaker, dtype=torch.float32).state_dict()
    new = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and not any("visual" in name for name in changed)
    assert "lm_head.bias" not in {n for f in folder.glob("*.safetensors") for n in load_file(f)}
    assert (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists()
    assert made.metrics["first_step_logprob_difference_max"] < 1e-4


def test_tensorboard_and_manifest_tell_what_happened(trained: tuple[Workspace, Any]) -> None:
    ws, made = trained
    found = steps(ws)
    assert len(found) == 6
    wanted = {
        "loss", "reward", "rewards/accuracy/mean", "rewards/format/mean", "rewards/length/mean",
        "completions/mean_length", "learning_rate", "grad_norm", "entropy", "ratio/mean",
        "sampling/logprob_difference_mean", "clip_ratio/region_mean", "frac_reward_zero_std",
    }  # fmt: skip
    assert wanted <= set(found[0])
    assert found[-1]["learning_rate"] == pytest.approx(1.5e-3)
    mean = np.mean([step["reward"] for step in found])
    assert mean == pytest.approx(made.metrics["mean_reward"], rel=1e-5)
    assert not (ws.stage_dir(1, "train") / "checkpoints").exists(), "removed once the final weights count"
    assert json.loads((ws.stage_dir(1, "train") / "shard_0000.json").read_text())["metrics"]["resumed_from_step"] == 0


def test_training_once_more_gives_the_same_weights(trained: tuple[Workspace, Any], new_run: NewRun) -> None:
    assert run(new_run()).made_from["weights_out"] == trained[1].made_from["weights_out"]


def test_other_pixel_limits_than_in_sampling_are_an_error(new_run: NewRun) -> None:
    with pytest.raises(UnusableData, match=r"4 image tokens, but its pictures make 1: .* max_pixels"):
        run(new_run("speaker.max_pixels=784", "speaker.min_pixels=784"))


def test_rollouts_of_other_weights_are_an_error(new_run: NewRun) -> None:
    ws = new_run()
    for shard in range(2):
        stored = manifest.manifest_path(ws, 1, "grade", shard)
        data = atomic.read_json(stored)
        path = ws.resolve(data["outputs"][0]["path"])
        table = pq.read_table(path)
        place = table.column_names.index("weights_hash")
        pq.write_table(table.set_column(place, "weights_hash", [["f" * 64] * len(table)]), path)
        data["outputs"][0].update(bytes=path.stat().st_size, sha256=manifest.sha256_of(path))
        atomic.write_json(stored, data)
    with pytest.raises(UnusableData, match=r"sampled with weights ffff.* Sample again"):
        run(ws)
