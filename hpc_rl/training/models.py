"""Models that are trained: head, number type, LoRA or all weights, frozen vision; and models that are only asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from hpc_rl.config.modeling import LoraConfig, ModelConfig, SpeakerConfig, TrainedModelConfig, VisionModelConfig
from hpc_rl.engines.base import BAN_BIAS
from hpc_rl.engines.loading import choose_attention, pick_device
from hpc_rl.training import check_base

log = logging.getLogger(__name__)

VISION = frozenset({"visual", "vision_tower", "vision_model"})
"""What families call the vision part of the model."""

Head = Literal["lm", "score"]
"""What a model ends in: log-probabilities of tokens, or one number (a reward model's or verifier's)."""
SCORE = "score"
"""What transformers' decoder models call the head of one number."""


def load(
    section: TrainedModelConfig, base: str, adapter: Path | None, *, deepspeed: bool, seed: int, head: Head = "lm"
) -> Any:
    """The model to be trained, as the last round left it.

    Without DeepSpeed, trained weights are float32 whatever its `dtype` is (forward passes run in `dtype` by autocast):
    steps of 5e-7 vanish in bfloat16. DeepSpeed keeps float32 masters of its own.

    Parameters
    ----------
    section
        Of the config.
    base, adapter
        Model folder, and the adapter to go on with. With `lora` and none a new one is put on, which changes
        nothing yet.
    seed
        Of the first weights of a new adapter, and of a head that `base` does not have. With LoRA a head of one number
        is trained whole, and its weights are the adapter's.

    Returns
    -------
    PeftModel or PreTrainedModel
    """
    lora = section.lora
    check_base.check(auto_class(section, head), base, adapter)
    torch.manual_seed(seed)
    model = _load(base, section, deepspeed, head)
    if lora is None:
        if freezes_vision(section):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(VISION.isdisjoint(name.split(".")))
    else:
        model = _with_adapter(model, lora, adapter, deepspeed, seed, head)
        _refuse_shared(model)
    trained = sum(size(p) for p in model.parameters() if p.requires_grad)
    log.info("trained: %s of %s parameters", f"{trained:,}", f"{sum(size(p) for p in model.parameters()):,}")
    if not trained:
        raise ValueError(f"lora.target_modules matches no module of {base}: {lora.target_modules if lora else '-'}")
    return model


def freezes_vision(section: TrainedModelConfig) -> bool:
    """Whether a vision tower is left as it is."""
    return isinstance(section, SpeakerConfig) and section.freeze_vision


def _with_adapter(model: Any, lora: LoraConfig, adapter: Path | None, deepspeed: bool, seed: int, head: Head) -> Any:
    import peft

    # ZeRO gathers parameters of one number type only; without it PEFT keeps the adapter in float32
    # (https://github.com/huggingface/trl/issues/6089).
    autocast = not deepspeed
    if adapter is not None:
        log.info("going on with the adapter in %s", adapter)
        loaded = peft.PeftModel.from_pretrained(
            model, str(adapter), is_trainable=True, autocast_adapter_dtype=autocast, local_files_only=True
        )
        loaded.peft_config["default"].base_model_name_or_path = model.config.name_or_path  # models may have moved
    else:
        torch.manual_seed(seed)
        targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
        fresh = peft.LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
            modules_to_save=[SCORE] if head == "score" else None,
        )  # fmt: skip
        loaded = peft.get_peft_model(model, fresh, autocast_adapter_dtype=autocast)
    if autocast:  # PEFT leaves out a head that is trained whole
        for parameter in loaded.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return loaded


def _refuse_shared(model: Any) -> None:
    """Refuse LoRA on a tensor that is embedding and head in one: merged into one it would change the other too."""
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if ends[1] is None or len({id(getattr(end, "base_layer", end).weight) for end in ends}) == 2:
        return
    named = [name for name, module in base.named_modules() if module in ends and hasattr(module, "lora_A")]
    if named:
        raise ValueError(
            f"lora.target_modules matches {', '.join(named)} of {base.config.name_or_path}, which shares its weights "
            "with the other end of the model (tie_word_embeddings): merged, LoRA there would change both. Leave it out"
        )


def ban(model: Any, token_ids: Sequence[int]) -> None:
    """Take tokens that sampling bans (L26) out of the policy's distribution, as the engines do, so that both agree.

    The head gets a frozen bias for it; `ban_parameter` names what must not be saved.
    """
    head = _head(model)
    if hasattr(head, "lora_A"):
        raise ValueError(
            f"lora.target_modules matches the head of {model.config.name_or_path}, lm_head. Its bias keeps out tokens "
            "that sampling bans: leave it out"
        )
    if head.bias is not None:
        raise ValueError(f"the head of {type(model).__name__} has a bias of its own: this family is not known here")
    bias = torch.zeros(head.out_features, dtype=model.dtype, device=head.weight.device)
    bias[list(token_ids)] = BAN_BIAS
    head.bias = torch.nn.Parameter(bias, requires_grad=False)


def ban_parameter(model: Any) -> str | None:
    """Name of the parameter that `ban` added, None if there is none."""
    bias = getattr(_head(model), "bias", None)  # one that ends in a score has no such head
    return next((name for name, parameter in model.named_parameters() if parameter is bias), None)


def _head(model: Any) -> Any:
    return getattr(model, "get_base_model", lambda: model)().get_output_embeddings()


def load_frozen(section: TrainedModelConfig, base: str, adapter: Path | None, *, deepspeed: bool) -> Any:
    """A model that is only asked, as training has it: a reference of which log-probabilities are taken.

    Its number type is that of the trained model, so that the two agree to the last bit where their weights do.

    Parameters
    ----------
    section, base, adapter, deepspeed
        As those of `load`.

    Returns
    -------
    PreTrainedModel
        The adapter's layers are in it.
    """
    check_base.check(auto_class(section, "lm"), base, adapter)
    model = _load(base, section, deepspeed, "lm")
    if adapter is not None:
        import peft

        loaded = peft.PeftModel.from_pretrained(
            model, str(adapter), autocast_adapter_dtype=not deepspeed, local_files_only=True
        )
        model = loaded.get_base_model()
    return model.requires_grad_(False).eval()


def auto_class(section: ModelConfig, head: Head) -> Any:
    """What loads a model of this section."""
    if head == "score":
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if isinstance(section, VisionModelConfig) else AutoModelForCausalLM


def _load(path: str, section: TrainedModelConfig, deepspeed: bool, head: Head) -> Any:
    disable_progress_bar()  # logs are files
    dtype = section.dtype if section.lora is not None or deepspeed else "float32"
    attention = choose_attention(section.attn_implementation, pick_device())
    log.info("%s in %s, attention %s", path, dtype, attention)  # L19
    model, found = auto_class(section, head).from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        local_files_only=True,
        output_loading_info=True,
        **({"num_labels": 1} if head == "score" else {}),
    )
    missing = sorted(name for name in found["missing_keys"] if head == "lm" or not name.startswith(f"{SCORE}."))
    if missing:
        raise check_base.WrongBase(
            f"{path} lacks {len(missing)} of the tensors that its config.json asks for, {', '.join(missing[:3])} among "
            "them; they would be drawn at random. Is its download whole, and do its files belong together?"
        )
    return model


def size(parameter: Any) -> int:
    """Elements of a parameter, also where ZeRO-3 has spread it over the ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
