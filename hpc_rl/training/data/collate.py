"""From units of data to the tensors of a forward pass, named as TRL's collators and losses name them.

Each of these is a `hpc_rl.training.data.batches.Maker`. A filler (weight 0) keeps its tokens, as the model must have
some to look at, but none that a sum over the tokens of the whole step would count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_rl.training.base import Tensors
from hpc_rl.training.data import rollouts
from hpc_rl.training.data.pairs import Pair
from hpc_rl.training.data.pixels import Pictures
from hpc_rl.training.data.plan import Item, Step
from hpc_rl.training.data.rollouts import Rollout, Scale, advantages, by_batch
from hpc_rl.training.data.solutions import Question
from hpc_rl.training.data.texts import Pack, Text
from hpc_rl.training.errors import UnusableData

IGNORED = -100
"""Label of a token that no loss is counted over."""


class Rollouts:
    """Rollouts, as TRL's GRPO and RLOO take them.

    Makes `prompt_ids`, `prompt_mask` (B, P), padded on the left; `completion_ids`, `completion_mask`,
    `old_per_token_logps`, the sampler's (B, T), padded on the right, the masks 0 for fillers; `num_items_in_batch`, the
    sampled tokens of the whole optimizer step. With pictures also those of `Pictures`, and `mm_token_type_ids`
    (B, P + T).

    Parameters
    ----------
    pad_id
        The tokenizer's padding token.
    vision_ids
        Tokens that only a prompt may hold.
    pictures
        Of the rows; None for texts.

    Raises
    ------
    UnusableData
        When made, when a completion holds a vision token (L26), or a prompt does not fit its pictures.
    """

    def __init__(self, pad_id: int, vision_ids: frozenset[int] = frozenset(), pictures: Pictures | None = None) -> None:
        self._pad_id, self._vision_ids, self._pictures = pad_id, vision_ids, pictures

    def __call__(self, step: Step[Rollout], items: Sequence[Item[Rollout]]) -> Tensors:
        samples = [item.unit for item in items]
        for sample in samples:
            if not self._vision_ids.isdisjoint(sample.token_ids.tolist()):
                raise UnusableData(f"sample {sample.id} holds a vision token, which sampling must ban (L26)")
        prompts, completions = [one.prompt_ids for one in samples], [one.token_ids for one in samples]
        mask = _mask(completions) * torch.tensor([[item.weight] for item in items])
        made = {
            "prompt_ids": _padded(prompts, self._pad_id, left=True),
            "prompt_mask": _mask(prompts, left=True),
            "completion_ids": _padded(completions, self._pad_id),
            "completion_mask": mask,
            "old_per_token_logps": _padded([one.logprobs for one in samples], 0.0, torch.float32) * mask,
            "num_items_in_batch": torch.tensor(float(step.total("tokens"))),
        }
        if self._pictures is not None:
            made |= self._pictures([(f"sample {one.id}", one.row_id, one.prompt_ids) for one in samples])
            shown = torch.eq(made["prompt_ids"], self._pictures.image_id).long()
            made["mm_token_type_ids"] = torch.cat([shown, torch.zeros_like(made["completion_ids"])], dim=1)
        return made


class Advantages:
    """`advantages` (B,) of rollouts against their groups (`rollouts.advantages`); 0 for fillers.

    Parameters
    ----------
    all
        What is trained on.
    scale
        `batch` divides by the deviation of the rewards of the whole optimizer step.
    """

    def __init__(self, all: rollouts.Rollouts, scale: Scale) -> None:
        self._rewards, self._by_batch = all.rewards, scale == "batch"
        self._values = advantages(self._rewards, all.starts, scale)

    def __call__(self, step: Step[Rollout], items: Sequence[Item[Rollout]]) -> Tensors:
        values = self._values[[item.place for item in items]]
        if self._by_batch:
            values = by_batch(values, self._rewards[step.places])
        weights = [item.weight for item in items]
        return {"advantages": torch.as_tensor((values * weights).astype(np.float32))}


class ByPlace:
    """Numbers that somebody has for each unit: a float32 tensor (B,) of each array (N,), by its name; 0 for fillers."""

    def __init__(self, **arrays: NDArray[Any]) -> None:
        self._arrays = arrays

    def __call__(self, step: Step[Any], items: Sequence[Item[Any]]) -> Tensors:
        places, weights = [item.place for item in items], [item.weight for item in items]
        return {name: torch.as_tensor((own[places] * weights).astype(np.float32)) for name, own in self._arrays.items()}


class Texts:
    """Texts: `input_ids`, `attention_mask`, `labels` (B, L), padded on the right.

    Only completions have labels, and fillers none.

    Parameters
    ----------
    pad_id
        The tokenizer's padding token.
    weighted
        Also make `weights` (B, L): of each label.
    """

    def __init__(self, pad_id: int, weighted: bool = False) -> None:
        self._pad_id, self._weighted = pad_id, weighted

    def __call__(self, step: Step[Text], items: Sequence[Item[Text]]) -> Tensors:
        rows = [_ids(item.unit) for item in items]
        made = {
            "input_ids": _padded(rows, self._pad_id),
            "attention_mask": _mask(rows),
            "labels": _padded([_labels(item.unit, item.weight) for item in items], IGNORED),
        }
        if self._weighted:
            made["weights"] = _padded([_weights(item.unit) for item in items], 0.0, torch.float32)
        return made


class Packs:
    """Packs of texts in one row: `input_ids`, `position_ids`, `labels` (1, L), like TRL's padding-free batches.

    There is no attention mask: where positions begin anew the model knows that another text begins. The boundaries come
    for attention kernels that ask for them (`cu_seq_lens_q`, `cu_seq_lens_k` (texts + 1,), `max_length_q`,
    `max_length_k`, `seq_idx` (1, L)), so that the model need not look for them in every layer.

    Parameters
    ----------
    weighted
        Also make `weights` (1, L): of each label.
    """

    def __init__(self, weighted: bool = False) -> None:
        self._weighted = weighted

    def __call__(self, step: Step[Pack], items: Sequence[Item[Pack]]) -> Tensors:
        texts = [(text, item.weight) for item in items for text in item.unit.texts]
        rows = [_ids(text) for text, _ in texts]
        lengths = torch.tensor([len(row) for row in rows])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)])
        longest = int(lengths.max())
        made = {
            "input_ids": _joined(rows),
            "position_ids": _joined([np.arange(len(row)) for row in rows]),
            "labels": _joined([_labels(text, weight) for text, weight in texts]),
            "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
            "seq_idx": torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), lengths)[None],
        }  # fmt: skip
        if self._weighted:
            made["weights"] = _joined([_weights(text) for text, _ in texts], torch.float32)
        return made


class Pairs:
    """Pairs: `input_ids`, `attention_mask`, `completion_mask` (2B, L), padded on the right: first the chosen answers
    behind their prompts, then the rejected ones. A filler is masked like any pair: a mean over no token would be no
    number, and so would be 0 times it. With pictures also those of `Pictures`, once for each half, and
    `mm_token_type_ids` (2B, L).

    Parameters
    ----------
    pad_id
        The tokenizer's padding token.
    pictures
        Of the rows; None for texts.
    """

    def __init__(self, pad_id: int, pictures: Pictures | None = None) -> None:
        self._pad_id, self._pictures = pad_id, pictures

    def __call__(self, step: Step[Pair], items: Sequence[Item[Pair]]) -> Tensors:
        pairs = [item.unit for item in items]
        answers = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
        prompts = [pair.prompt_ids for pair in pairs] * 2
        rows = [np.concatenate(both) for both in zip(prompts, answers, strict=True)]
        masks = [
            np.concatenate([np.zeros(len(prompt), np.int64), np.ones(len(answer), np.int64)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        made: Tensors = {
            "input_ids": _padded(rows, self._pad_id),
            "attention_mask": _mask(rows),
            "completion_mask": _padded(masks, 0),
        }
        if self._pictures is not None:
            shown = self._pictures([(f"pair {pair.id}", pair.row_id, pair.prompt_ids) for pair in pairs])
            made |= {name: torch.cat([shown[name]] * 2) for name in ("pixel_values", "image_grid_thw")}
            made["mm_token_type_ids"] = torch.eq(made["input_ids"], self._pictures.image_id).long()
        return made


class Solutions:
    """Questions: `input_ids`, `attention_mask` (R, L), padded on the right, for all their solutions, question after
    question; `question` (R,), whose they are (from 0, in this pass); `label` (R,), 1 right, 0 wrong; `score` (R,), NaN
    where there is none.

    Parameters
    ----------
    pad_id
        The tokenizer's padding token.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, step: Step[Question], items: Sequence[Item[Question]]) -> Tensors:
        solutions = [solution for item in items for solution in item.unit.solutions]
        rows = [solution.token_ids for solution in solutions]
        sizes = torch.tensor([len(item.unit.solutions) for item in items])
        return {
            "input_ids": _padded(rows, self._pad_id),
            "attention_mask": _mask(rows),
            "question": torch.repeat_interleave(torch.arange(len(items)), sizes),
            "label": torch.tensor([solution.label for solution in solutions]),
            "score": torch.tensor([solution.score for solution in solutions], dtype=torch.float32),
        }


def _ids(text: Text) -> NDArray[np.int32]:
    return np.concatenate([text.prompt_ids, text.completion_ids])


def _labels(text: Text, weight: int) -> NDArray[np.int32]:
    prompt = np.full(len(text.prompt_ids), IGNORED, np.int32)
    completion = text.completion_ids if weight else np.full(len(text.completion_ids), IGNORED, np.int32)
    return np.concatenate([prompt, completion])


def _weights(text: Text) -> NDArray[np.float32]:
    return np.full(len(text.prompt_ids) + len(text.completion_ids), text.weight, np.float32)


def _joined(rows: Sequence[NDArray[Any]], dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Rows behind each other as one (1, sum of lengths) tensor."""
    return torch.as_tensor(np.concatenate(rows), dtype=dtype)[None]


def _mask(rows: Sequence[NDArray[Any]], left: bool = False) -> torch.Tensor:
    """1 where `_padded` has something of a row."""
    return _padded([np.ones(len(row), np.int64) for row in rows], 0, left=left)


def _padded(
    rows: Sequence[NDArray[Any]], value: float, dtype: torch.dtype = torch.long, left: bool = False
) -> torch.Tensor:
    """Rows as one (B, longest) tensor."""
    longest = max(len(row) for row in rows)
    out = torch.full((len(rows), longest), value, dtype=dtype)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        out[number, place] = torch.as_tensor(row, dtype=dtype)
    return out
