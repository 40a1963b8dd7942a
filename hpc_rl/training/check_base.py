"""Whether a base model, its tokenizer and an adapter belong together: asked before any weights are loaded.

PEFT takes whatever tensors of an adapter happen to fit, and transformers draws at random what a folder lacks. Both
train on without a word, so what does not belong together is refused here, from headers and JSON files alone. An adapter
folder says in `trained_on.json` which base it was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.integrations import deepspeed

from hpc_rl.run import atomic

TRAINED_ON = "trained_on.json"
ADAPTER = "adapter_model.safetensors"
MEANING = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""Parts of a tokenizer.json that say which ids a text has; padding and truncation do not."""


class WrongBase(ValueError):
    """A model folder that does not fit what is trained on it; the message names both sides, and the way out."""


@dataclass(frozen=True)
class Base:
    """What must not change under an adapter.

    Attributes
    ----------
    architecture
        `model_type` of its config.json.
    hidden_size, layers, vocabulary
        Of its language model.
    tokenizer
        Hash of its tokenizer; empty where there is none.
    """

    architecture: str
    hidden_size: int
    layers: int
    vocabulary: int
    tokenizer: str


def describe(folder: str | Path) -> Base:
    """The base model in a folder, by its config.json and tokenizer.json."""
    config = _config(folder)
    text = config.get_text_config()
    ids = _tokenizer(folder)
    tokenizer = hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()[:16] if ids else ""
    return Base(config.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size, tokenizer)


def write(adapter: Path, base: str | Path) -> None:
    """Note in an adapter's folder which base it was trained on."""
    atomic.write_json(adapter / TRAINED_ON, asdict(describe(base)))


def vocabulary(folder: str | Path) -> int:
    """How many token ids the model in a folder knows."""
    return int(_config(folder).get_text_config().vocab_size)


def check(auto_class: Any, base: str | Path, adapter: Path | None) -> None:
    """Refuse a base model, tokenizer and adapter that do not belong together.

    Parameters
    ----------
    auto_class
        What the base will be loaded with, `AutoModelForCausalLM` for one.
    base, adapter
        Folders; an adapter without `trained_on.json` is judged by the shapes of its tensors alone.

    Raises
    ------
    WrongBase
        When there is no such model in transformers, when the tokenizer has ids that the model does not know, or when
        the adapter was trained on another architecture, size or tokenizer.
    """
    config = _config(base)
    if type(config) not in auto_class._model_mapping:
        raise WrongBase(
            f"{base} is a {config.model_type}, which {auto_class.__name__} does not load: models with pictures have a "
            "section with min_pixels and max_pixels, models of texts alone have none"
        )
    largest = _largest_id(_tokenizer(base))
    if largest >= config.get_text_config().vocab_size:
        raise WrongBase(
            f"the tokenizer of {base} has token ids up to {largest}, its model knows {vocabulary(base)}: they are not "
            "of one model. Copy tokenizer.json and config.json from the same place"
        )
    if adapter is not None:
        _check_adapter(auto_class, config, base, adapter)


def _check_adapter(auto_class: Any, config: Any, base: str | Path, adapter: Path) -> None:
    way_out = f"Set the model's path to the base that {adapter} was trained on, or begin a new run with this one"
    if (adapter / TRAINED_ON).exists():
        now, noted = asdict(describe(base)), atomic.read_json(adapter / TRAINED_ON)
        for name in now:
            if now[name] != noted[name]:
                raise WrongBase(
                    f"{adapter} was trained on a base whose {name.replace('_', ' ')} is {noted[name]}; that of {base} "
                    f"is {now[name]}. {way_out}"
                )
    with torch.device("meta"), _not_dealt_out():
        model = auto_class._model_mapping[type(config)](config)
    modules = dict(model.named_modules())
    with safe_open(adapter / ADAPTER, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            path, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight"):
                continue
            if path not in modules:
                raise WrongBase(
                    f"{adapter} has an adapter for {path}; {base}, a {config.model_type}, has no such module. {way_out}"
                )
            wide = modules[path].weight.shape
            side = 1 if part == "A.weight" else 0
            if tensors.get_slice(name).get_shape()[side] != wide[side]:
                raise WrongBase(
                    f"{adapter}: {name} is {tuple(tensors.get_slice(name).get_shape())}, which does not fit the "
                    f"{tuple(wide)} of {path} in {base}. {way_out}"
                )


@contextmanager
def _not_dealt_out() -> Iterator[None]:
    """With ZeRO-3 set, transformers would deal the weights of a model out as it is made, also those that are none."""
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def _config(folder: str | Path) -> Any:
    if not (Path(folder) / "config.json").is_file():
        raise WrongBase(f"{folder} is no model folder: it has no config.json")
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _tokenizer(folder: str | Path) -> dict[str, Any]:
    """What of a folder's tokenizer.json says which ids a text has; empty without one."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return {}
    read = json.loads(file.read_text(encoding="utf-8"))
    return {name: read.get(name) for name in MEANING}


def _largest_id(tokenizer: dict[str, Any]) -> int:
    if not tokenizer:
        return -1
    words = tokenizer["model"].get("vocab", {})
    of_words: int = max(words.values(), default=-1) if isinstance(words, dict) else len(words) - 1
    return max(of_words, *(int(token["id"]) for token in tokenizer["added_tokens"] or []), -1)
