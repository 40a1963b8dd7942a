"""What makes two configs the same experiment: the JSON that jobs read, its hash, and the keys in which two differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hpc_rl.config.schema import Config

CIRCUMSTANCES: tuple[str, ...] = (
    "cluster",
    "local",
    "logging",
    "services",
    "stages",
    "run.name",
    "run.workspace",
    "run.rounds",
    "run.lookahead",
    "run.max_attempts",
    "run.auto_retry",
    "run.retry_delay_s",
    "run.continue_on_failure",
    "run.lease_ttl_s",
    "run.linger_s",
    "run.gate_patience_s",
    "sample.data_parallel_size",
    "sample.gpu_ids",
    "sample.tensor_parallel_size",
    "sample.worker_patience_s",
    "sample.max_num_seqs",
    "sample.gpu_memory_utilization",
    "sample.min_gpu_memory_utilization",
    "sample.cpu_kv_cache_gib",
    "sample.stage_to",
    "sample.load_strategy",
    "sample.keep_compiled",
    "sample.speculate",
    "evaluate.batch_size",
    "evaluate.sample_texts_to_log",
)
OF_TRAINING = (
    "deepspeed", "fsdp", "fused_kernels", "backend", "preflight_s", "save_steps", "save_minutes", "keep_checkpoints",
    "log_completions",
)  # fmt: skip
"""The same of each section in `Config.train_sections`."""
"""What may change while a run goes on: where and how patiently it runs, not what it computes.

`run.rounds` is among them so that a run can be extended. So is DeepSpeed's JSON (`OF_TRAINING`): the ZeRO stages
compute the same, and offload is the way out when a GPU is too small. Of `stages` only the ranks of training count: they
multiply the batch.
"""


def to_json(config: Config) -> dict[str, Any]:
    """The resolved config as JSON data, in the order of the schema, with every default written out."""
    return config.model_dump(mode="json")


def identity(config: Config) -> dict[str, Any]:
    """The experiment as flat `dotted key: value` pairs, sorted: `to_json` without `CIRCUMSTANCES`."""
    flat = dict(_flatten(to_json(config), ""))
    free = circumstances(type(config))
    kept = {key: value for key, value in flat.items() if not any(_is_below(key, name) for name in free)}
    for stage in config.train_sections:
        kept[f"stages.{stage}.world_size"] = config.stages[stage].world_size
    return dict(sorted(kept.items()))


def circumstances(kind: type[Config]) -> list[str]:
    """Fields, or sections, that are no part of the experiment; of a kind of config."""
    trainings = [field for fields in kind.train_sections.values() for field in fields]
    return [*CIRCUMSTANCES, *(f"{field}.{name}" for field in trainings for name in OF_TRAINING)]


def config_hash(config: Config) -> str:
    """SHA-256 of the experiment, in hex. Equal for configs that differ only in `CIRCUMSTANCES`."""
    text = json.dumps(identity(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """The fields in which two experiments differ, as (dotted key, value in `a`, value in `b`); None where one has none.

    Empty exactly when the hashes are equal.
    """
    in_a, in_b = identity(a), identity(b)
    keys = sorted({*in_a, *in_b})
    absent = object()
    return [(key, in_a.get(key), in_b.get(key)) for key in keys if in_a.get(key, absent) != in_b.get(key, absent)]


def _is_below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flatten(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
