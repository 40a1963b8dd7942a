"""Log-probabilities of a round's units under a model that is not trained: of KL, of DPO's reference, of the old policy.

A model goes through the units once before training and is in memory only for that long (`reference: pass`), or a stage
of its own has done so on as many machines as it likes (`reference: stage`, `jobs.reference`). What comes of it lies
beside the checkpoints (`hpc_rl.training.scores`) and is read with each batch.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers.integrations import is_deepspeed_zero3_enabled

from hpc_rl.engines.base import banned_ids
from hpc_rl.engines.loading import tokenizer_of
from hpc_rl.engines.weights import Weights
from hpc_rl.orchestrate.giving_up import GIVEN_UP
from hpc_rl.run.private import untrusted
from hpc_rl.training import models
from hpc_rl.training.base import IN_MODEL_DTYPE, ROWS, SHARE, UNITS, Tensors
from hpc_rl.training.checkpointing.checkpoints import Checkpoints
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.ranks.distributed import all_gather_objects, barrier, broadcast_object
from hpc_rl.training.scores import INDEX, Part, Scores
from hpc_rl.training.trl_parts import add_fused_lm_head

if TYPE_CHECKING:
    from hpc_rl.training.run import TrainRun

log = logging.getLogger(__name__)

Forward = Callable[[Any, Tensors], Sequence[NDArray[np.float32]]]
"""From a model and a batch on its device to the numbers of each unit of the batch."""

PICTURES = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
SAFE_S = 30.0
"""A pass that is killed has to do again what it did in so long at most."""
LOOK_AGAIN_S = 0.5
STAGE = "stage"
"""Parts that hold what the reference stage has scored are called so."""


class BatchesOfARank(Protocol):
    """The forward passes of one rank (`hpc_rl.training.data.batches.Batches`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Tensors: ...


@dataclass(frozen=True, eq=False)
class Scoring:
    """What a model is to score.

    Attributes
    ----------
    units
        All of them (`hpc_rl.training.data.units.Units`).
    batches
        This rank's part of them, each unit once; as many batches on every rank.
    forward
        What is computed of a batch.
    temperature
        What logits are divided by.
    banned
        Whether tokens that sampling bans (L26) have no probability.
    """

    units: Any
    batches: BatchesOfARank
    forward: Forward
    temperature: float = 1.0
    banned: bool = True


def completions(model: Any, batch: Tensors) -> list[NDArray[np.float32]]:
    """(T,) of each sample: log-probabilities of its sampled tokens. The batch is one of GRPO's."""
    mask = batch["completion_mask"]
    seen: Tensors = {name: batch[name] for name in PICTURES if name in batch}
    found = _logprobs(
        model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], mask], dim=1),
        torch.cat([torch.zeros_like(batch["prompt_mask"]), mask], dim=1),
        seen,
    )[:, -mask.size(1) :]
    return [row[:length].numpy() for row, length in zip(found, mask.sum(1).tolist(), strict=True)]


def pairs(model: Any, batch: Tensors) -> list[NDArray[np.float32]]:
    """(2,) of each pair: Σ log π of its chosen and of its rejected completion. The batch is one of DPO's."""
    seen = dict(batch)
    ids, attention, wanted = (seen.pop(name) for name in ("input_ids", "attention_mask", "completion_mask"))
    return list(torch.stack(_logprobs(model, ids, attention, wanted, seen).sum(1).chunk(2), dim=1).numpy())


def _logprobs(
    model: Any, ids: torch.Tensor, attention: torch.Tensor, wanted: torch.Tensor, seen: Tensors
) -> torch.Tensor:
    """(B, L − 1) log-probabilities of tokens 1 … L − 1, computed as TRL's trainers do; 0 where not wanted."""
    labels = ids.masked_fill(wanted == 0, -100)
    out = model(input_ids=ids, attention_mask=attention, **seen, labels=labels, fused_lm_head=True)
    found: torch.Tensor = out.log_probs.float().cpu()
    return found


def reference(run: TrainRun, checkpoints: Checkpoints, weights: Weights, scoring: Scoring) -> Scores:
    """Log-probabilities of all units under `weights`, from where the algorithm's `reference` says. All ranks call it.

    Call it after the trainer's settings are made (with ZeRO-3 they decide how models are loaded) and before the model
    that is trained is loaded: the two are never in memory together.

    Raises
    ------
    UnusableData
        When the stage scored with other weights or lacks a unit.
    """
    if run.task.settings.reference != "stage":  # type: ignore[attr-defined]
        return by_pass(run, checkpoints, weights, scoring)
    return _once(run, checkpoints, weights, scoring, lambda folder: _by_stage(run, weights, folder))


def by_pass(run: TrainRun, checkpoints: Checkpoints, weights: Weights, scoring: Scoring) -> Scores:
    """Log-probabilities of all units under `weights`, computed here. All ranks call it; see `reference`."""

    def write(folder: Path) -> None:
        # Batches are numbered within a shape, so a pass is continued in the same one. A whole one serves any.
        shape = run.shape
        name = f"{shape.ranks}x{shape.accumulation}x{shape.batch}-{run.world.rank}"
        before = [path.parent for path in checkpoints.folder.glob(f"*/{folder.name}/{name}{INDEX}")]
        part = Part(folder, name, [path for path in before if untrusted(path) is None])
        first = min(all_gather_objects(part.batches))
        part.begin(first)
        log.info("scoring %d units with weights %s, from batch %d", len(scoring.units), weights.hash[:16], first)
        began = safe = time.monotonic()
        with load(run, weights, scoring) as loaded:
            for number, ids, values in score(loaded, scoring, first):
                part.add(number, ids, values)
                if time.monotonic() - safe > SAFE_S:
                    part.flush()
                    run.got_further, safe = True, time.monotonic()
                    log.info("scored %d of %d batches in %.0f s", number + 1, len(scoring.batches), safe - began)
        part.flush()
        run.seconds["scoring"] = run.seconds.get("scoring", 0.0) + time.monotonic() - began

    return _once(run, checkpoints, weights, scoring, write)


@dataclass(eq=False)
class Loaded:
    """A model to score with (None after `load`'s block), its device, and the number type of its pictures."""

    model: Any
    device: torch.device
    dtype: torch.dtype


def score(
    loaded: Loaded, scoring: Scoring, first: int = 0
) -> Iterator[tuple[int, Sequence[str], Sequence[NDArray[np.float32]]]]:
    """Batches of this rank from `first` on: their numbers, and ids and numbers of their units.

    A filler has a pass but no result. Call it within `load`'s block.
    """
    for number in range(first, len(scoring.batches)):
        batch = dict(scoring.batches[number])
        ids, share, _ = batch.pop(UNITS), float(batch.pop(SHARE)), batch.pop(ROWS)
        for name, value in batch.items():
            if torch.is_tensor(value):
                batch[name] = value.to(loaded.device, loaded.dtype if name in IN_MODEL_DTYPE else value.dtype)
        values = scoring.forward(loaded.model, batch)
        if share:
            yield number, ids, values


@contextmanager
def load(run: TrainRun, weights: Weights, scoring: Scoring) -> Iterator[Loaded]:
    """A model for this scoring, and others of the same kind, as long as the block lasts: as in training, but for the
    gradient."""
    section, deepspeed = run.task.role.model, run.deepspeed
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    dtype = getattr(torch, section.dtype)
    model = models.load_frozen(section, weights.base, weights.adapter, deepspeed=deepspeed is not None)
    if scoring.banned:
        models.ban(model, banned_ids(run.start.base, tokenizer_of(run.processor())))
    add_fused_lm_head(model, temperature=scoring.temperature)
    engine = None
    if is_deepspeed_zero3_enabled():
        engine = model = _partitioned(model, deepspeed or {}, section.dtype)
    else:  # the other stages spread gradients and optimizer only
        model.to(device)
    mixed = deepspeed is None and dtype != torch.float32
    loaded = Loaded(model, device, torch.float32 if deepspeed is None else dtype)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype) if mixed else nullcontext():
            yield loaded
    finally:
        if engine is not None:
            engine.destroy()
        del model, engine
        loaded.model = None  # whoever still holds this holds no weights
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()


def _partitioned(model: Any, config: dict[str, Any], dtype: str) -> Any:
    """A model whose weights are spread over the ranks, without what only training needs."""
    import deepspeed

    offload = {key: value for key, value in config["zero_optimization"].items() if key == "offload_param"}
    numbers = {"bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True}}}.get(dtype, {})
    inference = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **offload}, **numbers}
    return deepspeed.initialize(model=model, config=inference)[0]


def _once(
    run: TrainRun, checkpoints: Checkpoints, weights: Weights, scoring: Scoring, write: Callable[[Path], None]
) -> Scores:
    """What all ranks write with `write`, unless an attempt at this training has written it before."""
    of = f"{checkpoints.fingerprint} {weights.hash} {scoring.temperature} {scoring.banned}"
    name = f"scores-{hashlib.sha256(of.encode()).hexdigest()[:16]}"
    folder = None
    if run.world.is_main:
        before = [path for path in checkpoints.folder.glob(f"*/{name}") if untrusted(path) is None]
        folder = next((path for path in before if not len(Scores(path).missing(scoring.units))), None)
    folder = broadcast_object(folder)
    if folder is None:
        folder = checkpoints.own / name
        write(folder)
        barrier()
    else:
        log.info("log-probabilities under weights %s are in %s", weights.hash[:16], folder)
    return _complete(run, folder, scoring.units)


def _complete(run: TrainRun, folder: Path, units: Any) -> Scores:
    """What is in a folder, once every rank sees all of it: other nodes' files may be late."""
    late = time.monotonic() + run.job.config.cluster.file_system_lag_s
    while True:
        scores = Scores(folder)
        missing = scores.missing(units)
        everyone = all_gather_objects((len(missing), time.monotonic() > late))
        most = max(count for count, _ in everyone)
        if not most:
            return scores
        if everyone[0][1]:
            break
        time.sleep(LOOK_AGAIN_S)
    first = units.rows(missing[:1])[0].id if len(missing) else "seen by this rank"
    way_out = (
        "Remove the reference stage's folder of the round and launch: it is done again."
        if any(folder.glob(f"{STAGE}-*"))
        else f"Ranks write them to {folder}: do all nodes see that folder? See cluster.file_system_lag_s."
    )
    raise UnusableData(f"{most} of {len(units)} units have no log-probabilities, the first is {first}. {way_out}")


def _by_stage(run: TrainRun, weights: Weights, folder: Path) -> None:
    """The rows of the reference stage's shards, each read by one rank."""
    data = run.task.reference
    if data is None:
        raise ValueError(
            f"{run.task.section}.reference is stage, but the recipe {run.job.config.recipe} has none for it. Set it to "
            "pass, or see hpc_rl/recipes/reference.py"
        )
    part = Part(folder, f"{STAGE}-{run.world.rank}")
    part.begin(0)
    every = run.job.inputs(data.stage.round, data.stage.name)
    for shard, made in enumerate(islice(every, run.world.rank, None, run.world.size)):
        if GIVEN_UP in made.made_from:
            raise UnusableData(
                f"{made.stage} of round {made.round} was given up ({made.made_from[GIVEN_UP]}), so nobody has scored "
                f"the data under the reference. To have it done remove the folders {made.stage} and "
                f"{run.job.stage.name} of the round and launch, or set {run.task.section}.reference to pass"
            )
        if made.made_from["weights"] != weights.hash:
            raise UnusableData(
                f"{made.path(data.file)} was scored with weights {str(made.made_from['weights'])[:16]}, but the "
                f"reference is {weights.hash[:16]} ({weights.adapter or weights.base}). Remove the folder "
                f"{made.path(data.file).parent} and launch: it is done again."
            )
        for ids, values in read_parquet(made.path(data.file)):
            part.add(shard, ids, values)
            part.flush()


def read_parquet(file: Path) -> Iterable[tuple[list[str], list[NDArray[np.float32]]]]:
    """Ids and numbers in an output of the reference stage, some at a time."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(1024, columns=["unit_id", "logprobs"], use_threads=False):
            yield batch["unit_id"].to_pylist(), [row.values.to_numpy() for row in batch["logprobs"]]
