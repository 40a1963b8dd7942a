"""What must be true of the file system before anything is submitted: storage, models, images, the DeepSpeed JSON.

The login node runs this, so it stays cheap whatever the size of the data: folders are listed, model folders are looked
into but no weights are opened, and of a large image folder a bounded number of pictures is looked at (`check_images`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hpc_rl.config.check_storage import check_storage
from hpc_rl.config.errors import Problem
from hpc_rl.config.modeling import ModelConfig
from hpc_rl.config.schema import Config
from hpc_rl.config.training import TrainConfig


def check(
    config: Config, places: Mapping[str, str] = MappingProxyType({}), *, inside_files: bool = True
) -> list[Problem]:
    """Everything about the file system that would stop the run, all at once; an empty list when it may start.

    What only the recipe knows of is its `Config.file_problems`. Nothing is created or changed.

    Parameters
    ----------
    config
        As loaded.
    places
        `Loaded.places`, so that a problem says which line set the field.
    inside_files
        False: of the recipe's own files only whether they are there, not every row of a large one.
    """
    executor = config.cluster.executor
    if executor == "auto":
        executor = "slurm" if shutil.which("sbatch") else "local"
    problems = [
        *check_storage(config, executor),
        *_check_services(config),
        *_check_models(config),
        *_check_trainings(config),
        *config.file_problems(rows=inside_files),
    ]
    return [replace(problem, where=problem.where or places.get(problem.field, "")) for problem in problems]


def _check_services(config: Config) -> Iterator[Problem]:
    """Models that services bring themselves; a server that runs elsewhere needs none here."""
    for name in ("verifier", "reward_model", "teacher", "enhancer"):
        options: Any = config.services.of(name)
        if options.model is not None and options.client.url is None:
            yield from check_model(f"services.{name}.model", Path(options.model))


def _check_models(config: Config) -> Iterator[Problem]:
    """The models of the config's own sections; services bring theirs."""
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, ModelConfig) and name not in config.models_elsewhere():
            yield from check_model(f"{name}.path", Path(section.path))


def _check_trainings(config: Config) -> Iterator[Problem]:
    """DeepSpeed's JSON of each training."""
    for stage, fields in config.train_sections.items():
        model: ModelConfig | None = getattr(config, config.trained_models.get(stage, ""), None)
        for field in fields:
            settings: TrainConfig = getattr(config, field)
            if model is not None and settings.deepspeed is not None:
                name = config.trained_models[stage]
                yield from check_deepspeed(settings.deepspeed, model.dtype, section=field, model=name)


def check_model(field: str, path: Path) -> Iterator[Problem]:
    """A Hugging Face model folder: config.json that can be read, and weights as safetensors."""
    fetch = "fetch the model first (hf download NAME --local-dir FOLDER): the run itself downloads nothing"
    if not path.is_dir():
        what = f"{path} is a file" if path.exists() else f"the model folder {path} does not exist"
        yield Problem(field, what, "a folder with config.json and *.safetensors", f"correct the path, or {fetch}")
        return
    file = path / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Problem(field, f"{path} has no config.json, so it is no model", "a Hugging Face model folder", fetch)
        return
    except (OSError, ValueError) as error:
        yield Problem(field, f"{file} cannot be read: {error}", "JSON", fetch)
        return
    if not isinstance(found, dict) or "model_type" not in found:
        yield Problem(field, f"{file} names no model_type", "the config.json of a Hugging Face model", fetch)
    if next(path.glob("*.safetensors"), None) is None:
        way_out = "convert the weights (save_pretrained writes safetensors); pickled weights are never loaded"
        yield Problem(field, f"{path} has no *.safetensors", "weights as safetensors", way_out)


AUTO_IN_DEEPSPEED: dict[str, str] = {
    "train_batch_size": "per_device_batch_size × gradient_accumulation_steps × ranks",
    "train_micro_batch_size_per_gpu": "per_device_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "adam_betas",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_min_lr": "lr_scheduler",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "lr_scheduler",
}
"""Keys of a DeepSpeed JSON that must be absent or "auto", and the field that has the value (L18: in one place only)."""


def check_deepspeed(path: Path, dtype: str, section: str = "train", model: str = "speaker") -> Iterator[Problem]:
    """A DeepSpeed JSON that leaves learning rate, batch and number type to the config's sections."""
    field = f"{section}.deepspeed"
    shipped = "zero2.json, zero2_offload.json, zero3.json, zero3_offload.json in configs/deepspeed"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        way_out = f"relative paths start at the current directory; shipped: {shipped}"
        yield Problem(field, f"{path} does not exist", "a DeepSpeed JSON, or null", way_out)
        return
    except (OSError, ValueError) as error:
        yield Problem(field, f"{path} cannot be read: {error}", "a DeepSpeed JSON", f"shipped: {shipped}")
        return
    if not isinstance(data, dict):
        yield Problem(field, f"{path} is no JSON object", "a DeepSpeed JSON", f"shipped: {shipped}")
        return
    for key, owner in AUTO_IN_DEEPSPEED.items():
        value = _at(data, key)
        if value not in (None, "auto"):
            way_out = f'write "auto" there, and the value to {section}.{owner}'
            yield Problem(field, f"{path} sets {key} to {json.dumps(value)}", '"auto" or nothing', way_out)
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = _at(data, f"{key}.enabled")
        if isinstance(enabled, bool) and enabled != (dtype == name):
            what = f"{path} sets {key}.enabled to {json.dumps(enabled)}, but {model}.dtype is {dtype}"
            yield Problem(field, what, '"auto"', 'write "auto" there: the config decides')
    stage = _at(data, "zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        yield Problem(field, f"{path} sets zero_optimization.stage to {json.dumps(stage)}", "0, 1, 2 or 3")


def _at(data: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data
