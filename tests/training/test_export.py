"""Final weights on disk: any head, adapter and merged; what is wrong with them is found before they count."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.trainer_utils import align_special_tokens

from hpc_rl.engines.reward_model import RewardModel, TransformersJudge
from hpc_rl.training import check_base, models
from hpc_rl.training.exporting import consolidate, export, export_verify
from hpc_rl.training.exporting.consolidate import Consolidated
from hpc_rl.training.exporting.export_verify import BadExport
from tests.full_disk import full_disk
from tools import tiny_chat_model

HEADS = {"lm": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model; it stops at a token that its tokenizer does not name."""
    folder = tiny_chat_model.write(tmp_path_factory.mktemp("base") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [7, 8], "top_k": 5}))
    return folder


def of_base(base: Path, head: str) -> Any:
    """The base with a head, which is drawn at random where it has none."""
    return HEADS[head].from_pretrained(base, dtype=torch.float32, **({"num_labels": 1} if head == "score" else {}))


def trained(base: Path, head: str = "lm", *, lora: bool = False) -> Any:
    """A model as it is after training: other weights, and the tokens that transformers' trainer sets."""
    torch.manual_seed(1)
    model = of_base(base, head)
    if lora:
        config = peft.LoraConfig(
            r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"],
            modules_to_save=["score"] if head == "score" else None,
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    align_special_tokens(model, AutoTokenizer.from_pretrained(base))
    return model


def gathered(model: Any, folder: Path) -> Consolidated:
    """What rank 0 has of it."""
    found = consolidate.gather(Accelerator(cpu=True), model, AutoTokenizer.from_pretrained(folder))
    assert found is not None
    return found


def answers(model: Any, probe: export_verify.Probe) -> float:
    """How far a model's answer is from the one that was given in training."""
    with torch.no_grad():
        return float((model.eval()(**probe.question).logits.float() - probe.answer).abs().max())


@pytest.mark.parametrize("head", HEADS)
def test_all_weights_load_as_documented_and_answer_as_in_training(base: Path, head: str, tmp_path: Path) -> None:
    model = trained(base, head)
    whole = gathered(model, base)
    folder = export.write(whole, tmp_path / "round_01", "t", dtype="float32")
    loaded = HEADS[head].from_pretrained(folder)
    assert answers(loaded, whole.probe) < 1e-5
    assert answers(of_base(base, head), whole.probe) > 0.1


@pytest.mark.parametrize("head", HEADS)
def test_with_both_the_adapter_and_the_merged_model_answer_as_in_training(
    base: Path, head: str, tmp_path: Path
) -> None:
    whole = gathered(trained(base, head, lora=True), base)
    folder = export.write(whole, tmp_path / "round_01", "t", dtype="float32", export="both")
    assert answers(peft.PeftModel.from_pretrained(of_base(base, head), folder), whole.probe) < 1e-5
    check_base.check(HEADS[head], base, folder)
    assert (folder / check_base.TRAINED_ON).is_file(), "and another base would be refused by it"
    assert answers(HEADS[head].from_pretrained(folder / "merged"), whole.probe) < 1e-4


def test_the_merged_model_alone_has_nothing_of_the_adapter(base: Path, tmp_path: Path) -> None:
    whole = gathered(trained(base, lora=True), base)
    folder = export.write(whole, tmp_path / "round_01", "t", dtype="bfloat16", export="merged")
    assert not list(folder.glob("adapter*"))
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_generation_stops_where_it_did_before_training(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    assert model.config.eos_token_id != 7
    folder = export.write(gathered(model, base), tmp_path / "round_01", "t", dtype="float32")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
    assert (folder / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("lora", [False, True])
def test_a_trained_reward_model_is_served_with_the_scores_of_training(base: Path, lora: bool, tmp_path: Path) -> None:
    model = trained(base, "score", lora=lora)
    folder = export.write(gathered(model, base), tmp_path / "round_01", "t", dtype="float32", export="merged")
    served = RewardModel(str(folder), TransformersJudge(str(folder)))
    rows = [served.encode("Is 2 + 3 = 5?", solution) for solution in ("yes", "no no no")]
    ids = [torch.tensor([row]) for row in rows]
    with torch.no_grad():
        scores = [float(model.eval()(input_ids=one).logits) for one in ids]
    assert served.scores(rows) == pytest.approx(scores, abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_that_sees_is_asked_about_a_picture(speaker: Path, lora: bool, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(speaker)
    model = AutoModelForImageTextToText.from_pretrained(speaker, dtype=torch.float32)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    models.ban(model, [3, 5])  # as sampling does; it is no part of what is exported
    whole = consolidate.gather(Accelerator(cpu=True), model, processor)
    assert whole is not None and "pixel_values" in whole.probe.question
    folder = export.write(whole, tmp_path / "round_01", "t", dtype="float32", export="merged")
    assert not any(name.endswith("lm_head.bias") for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (torch.tensor([]), "1 tensors are empty, b among them"),
        (torch.tensor([torch.nan]), "1 tensors are not finite, b"),
    ],
    ids=["empty", "not a number"],
)
def test_weights_that_are_none_get_no_folder(damage: torch.Tensor, said: str, tmp_path: Path) -> None:
    whole: Any = SimpleNamespace(state={"a": torch.ones(2), "b": damage})
    with pytest.raises(BadExport, match=said):
        export.write(whole, tmp_path / "round_01", "t", dtype="float32")
    assert not list(tmp_path.iterdir())


def test_a_missing_and_a_changed_tensor_are_named(base: Path, tmp_path: Path) -> None:
    whole = gathered(trained(base), base)
    folder = export.write(whole, tmp_path / "round_01", "t", dtype="float32")

    def check() -> None:
        export_verify.verify_full(folder, whole.model, whole.state, whole.probe, "float32")

    check()
    file = folder / "model.safetensors"
    written, name = load_file(file), "model.layers.1.mlp.down_proj.weight"
    save_file({**written, name: written[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(BadExport, match=f"{name} is not what was trained"):
        check()
    save_file({key: value for key, value in written.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(BadExport, match=f"missing keys: .*{name}"):
        check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_equal_tensors_with_another_config_are_noticed(base: Path, head: str, dtype: str, tmp_path: Path) -> None:
    whole = gathered(trained(base, head, lora=True), base)
    folder = export.write(whole, tmp_path / "round_01", "t", dtype=dtype)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 1}))
    with pytest.raises(BadExport, match="does not answer as the trained model does"):
        export_verify.verify_adapter(folder, whole.model, whole.state, whole.probe, dtype)


def test_a_full_disk_is_named_with_what_is_needed(base: Path, tmp_path: Path) -> None:
    whole = gathered(trained(base, lora=True), base)
    for mode in ("adapter", "merged"):
        with full_disk(), pytest.raises(OSError, match=r"no room for the final weights in .* go(es)? on from its last"):
            export.write(whole, tmp_path / "round_01", mode, dtype="float32", export=mode)  # type: ignore[arg-type]
        export.remove_temporary(tmp_path / "round_01", mode)
    assert not list(tmp_path.iterdir())
    folder = export.write(whole, tmp_path / "round_01", "after", dtype="float32")
    assert export.put_in_place(folder, tmp_path / "round_01", "after", lambda: True)


def test_more_than_the_disk_has_is_not_begun(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gathered(trained(base), base)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"they take 0.000 GB, and 0.000 GB are free"):
        export.write(whole, tmp_path / "round_01", "t", dtype="float32")
    assert not list(tmp_path.iterdir())


def test_who_claims_the_stage_removes_what_killed_attempts_left(tmp_path: Path) -> None:
    for name in ("round_01", ".tmp-round_01-killed", ".old-round_01-killed", ".tmp-round_012-another", "round_012"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    export.remove_leftovers(tmp_path / "round_01")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-round_012-another", "round_01", "round_012"]


def test_a_ban_alone_is_no_divergence() -> None:
    one = torch.randn(1, 3, 8)
    banned = one.clone()
    banned[..., 2] -= 100
    assert export_verify.divergence(banned, one) < 1e-6
    assert export_verify.divergence(banned, one + torch.randn(1, 3, 8)) > 0.1
