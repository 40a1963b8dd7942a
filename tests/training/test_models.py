"""Models that are trained: which head, which number type; a base that does not fit is refused before it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hpc_rl.config.modeling import LoraConfig, SpeakerConfig, TrainedModelConfig
from hpc_rl.training import check_base, models
from hpc_rl.training.check_base import WrongBase
from tools.tiny_chat_model import write

LORA = LoraConfig(r=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    return write(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """One that may be changed."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny chat model, as a round leaves it, with weights that are not 0."""
    folder = tmp_path_factory.mktemp("adapter") / "round_01"
    model = models.load(section(base, LORA), str(base), None, deepspeed=False, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    check_base.write(folder, base)
    return folder


def section(base: Path, lora: LoraConfig | None = None, dtype: str = "float32") -> TrainedModelConfig:
    return TrainedModelConfig.model_validate({"path": str(base), "dtype": dtype, "lora": lora})


def edit(folder: Path, **fields: object) -> None:
    """Change a config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_head_of_one_number_is_drawn_from_the_seed_and_trained_whole(base: Path, lora: LoraConfig | None) -> None:
    made = [
        models.load(section(base, lora, "bfloat16"), str(base), None, deepspeed=deepspeed, seed=seed, head="score")
        for deepspeed, seed in ((False, 1), (False, 1), (False, 2), (True, 1))
    ]
    heads = [
        [p for name, p in model.named_parameters() if "score" in name and p.requires_grad][0]  # noqa: RUF015
        for model in made
    ]
    assert heads[0].shape[0] == 1
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert [head.dtype for head in heads] == [torch.float32] * 3 + [torch.bfloat16], "DeepSpeed keeps masters itself"
    trained = {name for name, p in made[0].named_parameters() if p.requires_grad}
    if lora:
        assert all("lora_" in name or "score" in name for name in trained)


def test_a_reward_model_goes_on_with_its_head(base: Path, tmp_path: Path) -> None:
    first = models.load(section(base), str(base), None, deepspeed=False, seed=1, head="score")
    first.save_pretrained(tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    second = models.load(section(tmp_path), str(tmp_path), None, deepspeed=False, seed=2, head="score")
    assert torch.equal(first.score.weight, second.score.weight)


def test_a_frozen_model_with_an_adapter_is_the_trained_one_to_the_last_bit(base: Path, adapter: Path) -> None:
    trained = models.load(section(base, LORA), str(base), adapter, deepspeed=False, seed=1).eval()
    frozen = models.load_frozen(section(base, LORA), str(base), adapter, deepspeed=False)
    plain = models.load_frozen(section(base, LORA), str(base), None, deepspeed=False)
    with torch.no_grad():
        assert torch.equal(trained(IDS).logits, frozen(IDS).logits)
        assert not torch.allclose(frozen(IDS).logits, plain(IDS).logits)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_weights_that_a_folder_lacks_are_not_drawn_at_random(copy: Path) -> None:
    edit(copy, num_hidden_layers=3, layer_types=None)
    with pytest.raises(WrongBase, match=r"lacks \d+ of the tensors .* model\.layers\.2\."):
        models.load(section(copy), str(copy), None, deepspeed=False, seed=1)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongBase, match=r"is no model folder: it has no config\.json"):
        check_base.check(AutoModelForCausalLM, tmp_path, None)


def test_a_model_of_texts_is_not_loaded_as_one_that_sees(base: Path) -> None:
    with pytest.raises(WrongBase, match="is a qwen2, which AutoModelForImageTextToText does not load"):
        models.load(SpeakerConfig(path=str(base)), str(base), None, deepspeed=False, seed=1)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(copy: Path) -> None:
    read = json.loads((copy / "tokenizer.json").read_text())
    read["added_tokens"].append({**read["added_tokens"][0], "id": 100_000, "content": "<|more|>"})
    (copy / "tokenizer.json").write_text(json.dumps(read))
    with pytest.raises(WrongBase, match=rf"token ids up to 100000, its model knows {check_base.vocabulary(copy)}"):
        check_base.check(AutoModelForCausalLM, copy, None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "architecture is qwen2; .* is qwen3"),
        ({"hidden_size": 128}, "hidden size is 64; .* is 128"),
        ({"num_hidden_layers": 4, "layer_types": None}, "layers is 2; .* is 4"),
    ],
)
def test_an_adapter_is_not_put_on_another_base(
    copy: Path, adapter: Path, changed: dict[str, object], said: str
) -> None:
    edit(copy, **changed)
    with pytest.raises(WrongBase, match=f"{adapter} was trained on a base whose {said}"):
        models.load(section(copy, LORA), str(copy), adapter, deepspeed=False, seed=1)


def test_an_adapter_is_not_put_on_a_base_with_another_tokenizer(copy: Path, adapter: Path) -> None:
    """Two words change places: nothing but their ids tells."""
    read = json.loads((copy / "tokenizer.json").read_text())
    words = read["model"]["vocab"]
    one, other = list(words)[20:22]
    words[one], words[other] = words[other], words[one]
    (copy / "tokenizer.json").write_text(json.dumps(read))
    with pytest.raises(WrongBase, match="was trained on a base whose tokenizer is"):
        models.load(section(copy, LORA), str(copy), adapter, deepspeed=False, seed=1)


def test_how_a_tokenizer_pads_is_no_other_tokenizer(copy: Path, base: Path) -> None:
    read = json.loads((copy / "tokenizer.json").read_text())
    read["padding"] = {"strategy": {"Fixed": 7}, "direction": "Left", "pad_to_multiple_of": None,
                       "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(read))
    assert check_base.describe(copy) == check_base.describe(base)


def test_an_adapter_from_elsewhere_is_judged_by_its_shapes(base: Path, adapter: Path, tmp_path: Path) -> None:
    foreign = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (foreign / check_base.TRAINED_ON).unlink()
    check_base.check(AutoModelForCausalLM, base, foreign)
    for name, changed, said in (
        ("wide", {"hidden_size": 128}, r"does not fit the \(128, 128\) of model\.layers\.0\.self_attn\.q_proj"),
        ("flat", {"num_hidden_layers": 1, "layer_types": None}, r"adapter for model\.layers\.1\..*no such module"),
    ):
        other = Path(shutil.copytree(base, tmp_path / name))
        edit(other, **changed)
        with pytest.raises(WrongBase, match=said):
            check_base.check(AutoModelForCausalLM, other, foreign)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_lora_on_an_end_of_the_model_that_is_the_other_end_too_is_refused(copy: Path, module: str) -> None:
    lora = LoraConfig(r=4, alpha=8, dropout=0.0, target_modules=("q_proj", module))
    edit(copy, tie_word_embeddings=True)
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"target_modules matches (model\.)?{module} of .* shares its weights"):
        models.load(section(copy, lora), str(copy), None, deepspeed=False, seed=1)


def test_lora_on_a_head_that_bans_tokens_is_refused(base: Path) -> None:
    lora = LoraConfig(r=4, alpha=8, dropout=0.0, target_modules=("q_proj", "lm_head"))
    model = models.load(section(base, lora), str(base), None, deepspeed=False, seed=1)
    with pytest.raises(ValueError, match=r"target_modules matches the head of .* leave it out"):
        models.ban(model, [1])
