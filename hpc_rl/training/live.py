"""`rollouts: live`: the trainer samples by itself and asks the listener for each reward, as TRL's GRPO does (L12–L14).

All ranks send what they sampled to rank 0, which alone asks, so there is one cache for all ranks; the verdicts go back
to everybody. A completion without a score is no part of its group (L11): TRL takes its NaN rewards out of mean and
deviation and gives it advantage 0.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data.images import load_image
from hpc_rl.data.lewis import GameRow
from hpc_rl.grading.game import judge, weights_of
from hpc_rl.grading.predictions import prediction
from hpc_rl.services.calling import ServiceRefused, ServiceUnavailable
from hpc_rl.services.client import ListenerClient
from hpc_rl.training import settings
from hpc_rl.training.distributed import World, all_gather_objects, broadcast_object
from hpc_rl.training.grpo import Grpo, named
from hpc_rl.training.one_round import RoundTraining, Trained
from hpc_rl.training.rollouts import PARTS

log = logging.getLogger(__name__)

Parts = tuple[float, ...] | None
"""Parts of a reward in the order of `PARTS`; None where the listener gave no score."""


@dataclass(frozen=True)
class Asked:
    """A completion to be judged: its text, and which row it describes."""

    text: str
    row: int


@dataclass(frozen=True)
class _Failed:
    """Rank 0's error, in words: not every exception can be sent."""

    kind: str
    message: str

    def error(self) -> Exception:
        """The same for another rank."""
        for known in (ServiceUnavailable, ServiceRefused):
            if self.kind == known.__name__:
                return known(self.message)
        return RuntimeError(f"rank 0 failed: {self.kind}: {self.message}")


class LiveRewards:
    """Rewards for completions of all ranks.

    Parameters
    ----------
    world
        Rank 0 asks.
    rows
        The round's games, the same on all ranks.
    listener
        On rank 0; None on the others.
    predictions
        File for the prediction log (L22), written by rank 0.
    debug
        File for this rank's raw completions and rewards (L24), or None.
    """

    def __init__(
        self,
        world: World,
        config: LewisConfig,
        rows: Sequence[GameRow],
        listener: ListenerClient | None,
        predictions: Path | None,
        debug: Path | None,
    ) -> None:
        self._world, self._config, self._rows, self._listener = world, config, rows, listener
        self._predictions, self._debug = predictions, debug
        self.samples = self.left_out = 0

    def __call__(self, ours: Sequence[Asked], step: int) -> list[Parts]:
        """Reward parts of this rank's completions. All ranks must call it, each with as many as it has.

        Raises
        ------
        ServiceUnavailable, ServiceRefused
            On all ranks: see `ListenerClient.score`.
        RuntimeError
            On the other ranks, for whatever else rank 0 raises: they do not wait for it.
        """
        everyone = all_gather_objects(list(ours))
        verdicts: list[Parts] | _Failed = []
        if self._world.is_main:
            try:
                verdicts = self._judge([asked for rank in everyone for asked in rank], step)
            except Exception as error:
                broadcast_object(_Failed(type(error).__name__, str(error)))
                raise
        verdicts = broadcast_object(verdicts)
        if isinstance(verdicts, _Failed):
            raise verdicts.error()
        self.samples += len(verdicts)
        self.left_out += sum(verdict is None for verdict in verdicts)
        before = sum(len(rank) for rank in everyone[: self._world.rank])
        mine = verdicts[before : before + len(ours)]
        if self._debug is not None:
            with self._debug.open("a") as file:
                for asked, parts in zip(ours, mine, strict=True):
                    file.write(f"---- step {step} {self._rows[asked.row].id}\n{asked.text}\n{PARTS} {parts}\n")
        return mine

    def _judge(self, asked: Sequence[Asked], step: int) -> list[Parts]:
        assert self._listener is not None
        texts, rows = [one.text for one in asked], [self._rows[one.row] for one in asked]
        config = self._config
        verdicts = judge(texts, rows, self._listener, config.listener.question, config.rewards)
        if self._predictions is not None:
            weights, now = weights_of(config.rewards), datetime.now(UTC).isoformat(timespec="milliseconds")
            with self._predictions.open("a") as file:
                for text, row, verdict in zip(texts, rows, verdicts, strict=True):
                    line = prediction(now, step, row.id, row, text, verdict, verdict.reward.total(weights))
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return [
            None if verdict.left_out else tuple(getattr(verdict.reward, part) for part in PARTS) for verdict in verdicts
        ]


class LiveRollouts(Grpo):
    """GRPO on samples that the trainer draws by itself.

    Parameters
    ----------
    rows
        The round's games.
    picture
        Loads the picture of a game.
    rewards
        What completions are worth.
    """

    def __init__(
        self, *, rows: Sequence[GameRow], picture: Callable[[GameRow], Image.Image], rewards: LiveRewards, **others: Any
    ) -> None:
        prompts = [[{"role": "user", "content": row.speaker_problem}] for row in rows]
        super().__init__(
            reward_funcs=[named(part) for part in PARTS],
            train_dataset=Dataset.from_dict({"prompt": prompts, "row": list(range(len(rows)))}),
            **others,
        )
        self._rows, self._picture, self._rewards = rows, picture, rewards

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._buffered_inputs is None and self.state.global_step:
            # Resumed: TRL counts forward passes from 0 and would generate at the wrong ones.
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """Pictures are loaded here, once per generation, and not with every row that the loader repeats."""
        return super()._generate_and_score_completions(
            [{**row, "image": self._picture(self._rows[row["row"]])} for row in inputs]
        )

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        """(samples of all ranks, parts) rewards, NaN for those left out."""
        asked = [Asked(said[0]["content"], row["row"]) for said, row in zip(completions, inputs, strict=True)]
        parts = self._rewards(asked, self.state.global_step)
        nothing = (torch.nan,) * len(PARTS)
        table = torch.tensor([nothing if p is None else p for p in parts], device=self.accelerator.device)
        gathered: torch.Tensor = self.accelerator.gather(table.float())
        return gathered


def train(
    training: RoundTraining,
    rows: Sequence[GameRow],
    listener: ListenerClient | None,
    predictions: Path,
    debug: Path | None,
) -> Trained | None:
    """Train on samples that the trainer draws by itself. All ranks must call it, with the same rows.

    What it returns is what `RoundTraining.run` says.

    Parameters
    ----------
    rows
        The round's games.
    listener
        Who judges; on rank 0 only.
    predictions
        File for the prediction log.
    debug
        File for this rank's raw completions and rewards, or None.

    Raises
    ------
    ServiceUnavailable
        When no listener answered until the deadline.
    SystemExit
        When told to leave before the last step; a checkpoint was made.
    """
    began = time.monotonic()
    config, world = training.config, training.world
    steps = _steps(config, world, len(rows))
    checkpoints = training.checkpoints(f"live {steps} " + " ".join(row.id for row in rows))
    args = settings.grpo_config(config, training.deepspeed, checkpoints.own, round=training.round, live_steps=steps)
    processor = training.processor()
    model = training.model(processor.tokenizer)
    rewards = LiveRewards(world, config, rows, listener, predictions if world.is_main else None, debug)
    trainer = LiveRollouts(
        rows=rows, picture=lambda row: load_image(training.start.image_root / row.image), rewards=rewards, args=args,
        model=model, processor=processor, **training.trainer_parts(processor.tokenizer, checkpoints),
    )  # fmt: skip
    training.seconds["loading"] = time.monotonic() - began
    result = training.run(trainer, checkpoints)
    if result is None:
        return None
    return Trained(result.weights, {"samples": rewards.samples, "left_out": rewards.left_out, **result.metrics})


def _steps(config: LewisConfig, world: World, prompts: int) -> int:
    """Optimizer steps of a live round: `train.live_max_steps`, else one pass over its prompts."""
    train, per_step = config.train, settings.shape_of(config, world).samples
    steps = prompts * config.sample.samples_per_prompt // per_step
    if not steps:
        raise ValueError(
            f"an optimizer step takes {per_step} completions, but the round has {prompts} prompts × "
            f"{config.sample.samples_per_prompt}: lower train.per_device_batch_size or "
            "train.gradient_accumulation_steps, or raise sample.prompts_per_round"
        )
    return train.live_max_steps or steps * train.passes * train.epochs
