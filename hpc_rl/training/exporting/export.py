"""A round's final weights on disk: adapter, merged model or both, in Hugging Face folders that count once verified."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, GenerationConfig

from hpc_rl.engines.merging import WEIGHTS
from hpc_rl.engines.model_files import copy_files, model_files
from hpc_rl.run import atomic
from hpc_rl.training import check_base
from hpc_rl.training.checkpointing.checkpoints import sync_files
from hpc_rl.training.exporting.consolidate import Consolidated, State
from hpc_rl.training.exporting.export_verify import BadExport, Probe, auto_class, verify_adapter, verify_full
from hpc_rl.training.models import size

log = logging.getLogger(__name__)

Export = Literal["adapter", "merged", "both"]

ADAPTER = "adapter_model.safetensors"
MERGED = "merged"
"""Folder of the merged model in that of its adapter, with `export: both`."""
CONFIG, GENERATION = "config.json", "generation_config.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(trained: Consolidated, target: Path, token: str, *, dtype: str, export: Export = "adapter") -> Path:
    """Write and verify the folder under a temporary name; returns it. `put_in_place` gives it its own.

    Parameters
    ----------
    trained
        From `consolidate.gather`.
    target
        Where the folder will be.
    token
        Unique to this claim of the stage.
    dtype
        Number type of a whole model on disk: the one that the next round samples with. An adapter keeps its own.
    export
        What becomes of LoRA. adapter: a PEFT folder. merged: a whole model. both: the adapter, and the whole model in
        `merged` beside it. Without LoRA it is the whole model.

    Raises
    ------
    BadExport
        When there are empty tensors or such as are no numbers; when what was written cannot be loaded in the documented
        way, is not what was trained, or does not answer a question as the trained model did.
    OSError
        When the disk is full.
    """
    folder = _temporary(target, token)
    _check(trained.state)
    number_type: torch.dtype = getattr(torch, dtype)
    model, probe, adapter_only = trained.model, trained.probe, is_peft_model(trained.model)
    needed = sum(tensor.nbytes for tensor in trained.state.values()) if adapter_only and export != "merged" else 0
    if not adapter_only or export != "adapter":
        needed += sum(size(parameter) for parameter in model.parameters()) * number_type.itemsize
    with _room(target, needed):
        folder.mkdir(parents=True)
        if not adapter_only:
            _write_full(model, _of_type(trained.state, number_type), folder, probe, dtype)
        else:
            whole = {"adapter": None, "merged": folder, "both": folder / MERGED}[export]
            _write_adapter(trained, folder, dtype, whole)
        sync_files(folder)
    return folder


def _write_adapter(trained: Consolidated, folder: Path, dtype: str, merged: Path | None) -> None:
    """Write an adapter to `folder`, and its base with it merged in to `merged`, which may be the same folder: then
    that alone stays."""
    from safetensors.torch import save_file

    save_file(trained.state, folder / ADAPTER, metadata={"format": "pt"})
    config = trained.model.peft_config["default"]
    trained_before, config.inference_mode = config.inference_mode, True  # as PEFT's own save_pretrained does
    config.save_pretrained(folder)
    config.inference_mode = trained_before
    check_base.write(folder, str(config.base_model_name_or_path))
    loaded = verify_adapter(folder, trained.model, trained.state, trained.probe, dtype)
    if merged is None:
        return
    if merged == folder:
        for path in list(folder.iterdir()):
            path.unlink()
    model = loaded.merge_and_unload()
    state = _of_type(model.state_dict(), getattr(torch, dtype))
    _write_full(model, state, merged, trained.probe, dtype)


def _write_full(model: Any, state: State, folder: Path, probe: Probe, dtype: str) -> None:
    """Write a whole model with what its base has beside the weights.

    Which tokens begin, end and pad a text stays as it was in the base: transformers' trainer and TRL's set these in the
    model's config by the tokenizer, and generation would stop at others than before. A model that ends in a score finds
    its place by the padding token, so that one is as in training.
    """
    base = Path(model.config.name_or_path)
    beside = {
        name: status
        for name, status in model_files(base).items()
        if not name.endswith(WEIGHTS) and name not in (CONFIG, ADAPTER)
    }
    model.config.dtype = getattr(torch, dtype)
    model.generation_config = GenerationConfig()  # it is copied: one that transformers finds fault with is not saved
    model.save_pretrained(folder, state_dict=dict(state))  # it takes tied weights out of what it is given
    (folder / GENERATION).unlink(missing_ok=True)
    copy_files(base, beside, folder)
    written, before = (json.loads((where / CONFIG).read_text()) for where in (folder, base))
    scores = auto_class(model) is AutoModelForSequenceClassification
    for name in ("bos_token_id", "eos_token_id") if scores else ("bos_token_id", "eos_token_id", "pad_token_id"):
        written.pop(name, None)
        if name in before:
            written[name] = before[name]
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    verify_full(folder, model, state, probe, dtype)


def _check(state: State) -> None:
    """Raise BadExport unless all tensors hold something, and only finite numbers."""
    empty = [name for name, tensor in state.items() if not tensor.numel()]
    if empty or not state:
        named = f"{len(empty)} tensors are empty, {empty[0]} among them" if empty else "there are no tensors"
        raise BadExport(f"{named}: the ranks' parts were not brought together")
    not_finite = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise BadExport(f"training diverged: {len(not_finite)} tensors are not finite, {not_finite[0]} among them")


def _of_type(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@contextmanager
def _room(target: Path, needed_bytes: int) -> Iterator[None]:
    """Says so when the disk of `target` has, or turns out to have, no room for the weights.

    Raises
    ------
    OSError
        ENOSPC; the message says how much is needed, and what to do.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    no_room = OSError(
        errno.ENOSPC,
        f"no room for the final weights in {target.parent}: they take {needed_bytes / 1e9:.3f} GB, and "
        f"{free / 1e9:.3f} GB are free there (a quota may leave less). Make room and launch again: training goes on "
        "from its last checkpoint",
    )
    if free < needed_bytes:
        raise no_room
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has no exception of its own for a full disk; its message ends in "(os error 28)"
        said = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number in FULL:
            raise no_room from error
        raise


def put_in_place(folder: Path, target: Path, token: str, still_ours: Callable[[], bool]) -> bool:
    """Give a verified folder its own name; False, with nothing changed, when the work is no longer ours.

    Parameters
    ----------
    folder, target, token
        What `write` returned, and what it was called with.
    still_ours
        Asked right before: whether this claim holds and nobody has committed the stage. Then a folder that has the
        name already is a former attempt's, which ended before its manifest.
    """
    if not still_ours():
        return False
    if target.exists():
        target.rename(_replaced(target, token))
    folder.rename(target)
    atomic.fsync_folder(target.parent)
    return True


def remove_temporary(target: Path, token: str) -> None:
    """Remove what this claim, and no other, has left beside `target`."""
    for folder in (_temporary(target, token), _replaced(target, token)):
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove what attempts that were killed have left beside `target`: whole models, which would fill the disk.

    For who has just claimed the stage: nobody else writes there any more.
    """
    for folder in [*target.parent.glob(f".tmp-{target.name}-*"), *target.parent.glob(f".old-{target.name}-*")]:
        log.info("removing %s: its attempt was killed while it wrote final weights", folder)
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(target: Path, token: str) -> Path:
    return target.with_name(f".tmp-{target.name}-{token}")


def _replaced(target: Path, token: str) -> Path:
    return target.with_name(f".old-{target.name}-{token}")
