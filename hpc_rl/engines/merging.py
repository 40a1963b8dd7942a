"""A model folder with a LoRA adapter merged into its weights, for engines that sample faster without adapters."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_rl.engines.loading import load_model
from hpc_rl.engines.model_files import copy_files, model_files

WEIGHTS = (".safetensors", ".safetensors.index.json")


def merge_adapter(base: str | Path, adapter: Path, dtype: str, into: Path) -> Path:
    """Write `base` with `adapter` merged in to the empty folder `into`; returns `into`.

    The sum W + (α/r)·B·A is rounded to `dtype`: in bfloat16 a merged model's log-probabilities differ a little from
    those of the adapter beside the weights, which is what training computes.

    Parameters
    ----------
    base, adapter
        Model folder and PEFT folder.
    dtype
        Number type of the merged weights.
    into
        Where to; needs room for all weights.
    """
    from peft import PeftModel

    into.mkdir(parents=True, exist_ok=True)
    files = {name: status for name, status in model_files(Path(base)).items() if not name.endswith(WEIGHTS)}
    copy_files(
        Path(base), files, into
    )  # not their modes: a base that is read-only makes no copy that cannot be removed
    model = load_model(base, dtype, "sdpa", torch.device("cpu"))
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(into)
    return into


def lora_rank(adapter: Path) -> int:
    """The largest rank in a PEFT folder."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    return int(max([config.r, *(config.rank_pattern or {}).values()]))
