"""What a reward model says while it is trained: scores in float32, their loss, how often it tells right from wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from hpc_rl.config.training import SolutionLoss
from hpc_rl.run.seeds import derive
from hpc_rl.training.algorithms import pair_losses
from hpc_rl.training.base import Tensors
from hpc_rl.training.models import SCORE


class Float32Head(torch.nn.Linear):
    """A head that reckons in float32 whatever its weights and its input are, as `hpc_rl.engines.reward_model` does."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Scores of hidden states."""
        with torch.autocast(states.device.type, enabled=False):
            return linear(states.float(), self.weight.float())


def in_float32(model: Any) -> Any:
    """The model with its head, and the copy that LoRA trains, made a `Float32Head`; in bfloat16 good solutions tie."""
    heads = [module for name, module in model.named_modules() if SCORE in name.split(".")]
    for head in heads:
        if isinstance(head, torch.nn.Linear):
            head.__class__ = Float32Head  # in place: LoRA, ZeRO-3 and the state dict keep what they know of it
    return model


def padding_of(tokenizer: Any, folder: str) -> int:
    """The padding token, which no solution may end with (`hpc_rl.training.data.solutions.read`).

    transformers' heads read the last token that is not the padding's, vLLM the last one. And where there is none, TRL
    would take the end token for it.

    Raises
    ------
    ValueError
        When there is none.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no padding token: set pad_token in its tokenizer_config.json, and "
            "pad_token_id in config.json, to a token that no text ends with"
        )
    return int(tokenizer.pad_token_id)


def scores(model: Any, batch: Tensors) -> torch.Tensor:
    """(R,) float32 scores of the solutions of a batch (`hpc_rl.training.data.collate.Solutions`)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    found: torch.Tensor = logits[:, 0].float()
    return found


@dataclass(frozen=True)
class Objective:
    """What a reward model is to learn.

    Attributes
    ----------
    loss, penalty
        See `hpc_rl.training.algorithms.pair_losses`.
    seed
        Of the pairs that are drawn: they depend on the step and the question, never on the rank.
    """

    loss: SolutionLoss
    penalty: float
    seed: int

    def __call__(self, found: torch.Tensor, batch: Tensors, units: Sequence[str], step: int) -> torch.Tensor:
        """The mean loss over a batch's questions, whose ids are `units`."""
        draws = [derive(self.seed, "pair", step, unit) / 2**31 for unit in units]
        labels = batch["label"].cpu()
        return pair_losses.loss(self.loss, found, labels, sizes(batch), penalty=self.penalty, draws=draws)


def sizes(batch: Tensors) -> list[int]:
    """Solutions of each question of a batch."""
    found: list[int] = batch["question"].bincount().tolist()
    return found


class Tally:
    """Scores since the last log: over all ranks, each solution and each pair counted once."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64)  # solutions, their scores, pairs, right ones, their margins
        self._least, self._most = torch.inf, -torch.inf

    def add(self, found: torch.Tensor, batch: Tensors) -> None:
        """Take a batch in."""
        found = found.detach().double().cpu()
        pairs = pair_losses.pairs_of(batch["label"].cpu(), sizes(batch))
        questions = torch.split(found, sizes(batch))
        margins = torch.cat([pair_losses.margins(own)[of] for own, of in zip(questions, pairs, strict=True)])
        self._sums += torch.tensor(
            [len(found), float(found.sum()), len(margins), int((margins > 0).sum()), float(margins.sum())]
        )
        self._least, self._most = min(self._least, float(found.min())), max(self._most, float(found.max()))

    def drain(self, accelerator: Any) -> dict[str, float]:
        """TRL's numbers, and empty again. All ranks must call it."""
        own = torch.cat([self._sums, torch.tensor([self._least, self._most])]).float().to(accelerator.device)
        everyone = accelerator.gather(own[None]).double()
        self._empty()
        solutions, total, pairs, right, margins = everyone[:, :5].sum(0).tolist()
        if not solutions:
            return {}
        found = {
            "min_reward": float(everyone[:, 5].min()),
            "mean_reward": total / solutions,
            "max_reward": float(everyone[:, 6].max()),
        }
        return found | ({"accuracy": right / pairs, "margin": margins / pairs} if pairs else {})
