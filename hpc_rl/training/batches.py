"""Batches as tensors: what a rank's part of the plan becomes just before its forward pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hpc_rl.training.base import UNITS, Tensors
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.plan import Item, Shape, Step

ImagesOf = Callable[[str], Sequence[Image.Image]]
"""From a row's id to its pictures, in the order in which the prompt has them."""

PIXEL_CACHE_BYTES = 256 * 2**20


class Pixels:
    """Pictures of rows as a vision tower takes them. Those used last are kept: a group's samples share theirs.

    Parameters
    ----------
    image_processor
        Of the model, with the run's pixel limits.
    images_of
        Loads a row's pictures.
    """

    def __init__(self, image_processor: Any, images_of: ImagesOf, cache_bytes: int = PIXEL_CACHE_BYTES) -> None:
        self._processor, self._images_of, self._room = image_processor, images_of, cache_bytes
        self._kept: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def __call__(self, row_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (N, values) of all pictures of a row, and their grids (pictures, 3)."""
        if row_id in self._kept:
            self._kept.move_to_end(row_id)
            return self._kept[row_id]
        made = self._processor(images=list(self._images_of(row_id)), return_tensors="pt")
        found = self._kept[row_id] = (made["pixel_values"], made["image_grid_thw"])
        self._room -= found[0].nbytes
        while self._room < 0 and len(self._kept) > 1:
            self._room += self._kept.popitem(last=False)[1][0].nbytes
        return found

    def tokens(self, grids: torch.Tensor) -> int:
        """How many image tokens stand for pictures of these grids."""
        return int(grids.prod(-1).sum()) // int(self._processor.merge_size) ** 2


class Batches(Dataset[Tensors]):
    """One rank's forward passes of a plan, in order.

    Parameters
    ----------
    steps, shape, rank
        The plan, and whose part of it.
    pixels
        Pictures of the rows; None for texts.
    pad_id, image_id, vision_ids
        The tokenizer's padding token, the token that stands for image features (of a model that sees), and all tokens
        that only a prompt may hold.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        shape: Shape,
        rank: int,
        pixels: Pixels | None,
        *,
        pad_id: int,
        image_id: int | None,
        vision_ids: frozenset[int],
    ) -> None:
        self._steps, self._rank, self._pixels = steps, rank, pixels
        self._pad_id, self._image_id, self._vision_ids = pad_id, image_id, vision_ids
        self._accumulation = shape.accumulation

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation

    def __getitem__(self, number: int) -> Tensors:
        step = self._steps[number // self._accumulation]
        return self.tensors(step.batch(self._rank, number % self._accumulation), step.tokens)

    def loader(self) -> DataLoader[Tensors]:
        """Batches in order; a resumed training skips those that it has done without making them."""
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=_only)

    def tensors(self, items: Sequence[Item], step_tokens: int) -> Tensors:
        """Tensors of one forward pass, named as TRL's GRPO loss takes them.

        Parameters
        ----------
        items
            The samples of the pass.
        step_tokens
            Sampled tokens of the whole optimizer step over all ranks.

        Returns
        -------
        dict
            `prompt_ids`, `prompt_mask` (B, P), padded on the left; `completion_ids`, `completion_mask`,
            `old_per_token_logps` (B, T), padded on the right, the mask 0 for fillers; `advantages` (B,);
            `num_items_in_batch`, which is `step_tokens`; `units`, the samples' ids. With pictures also `pixel_values`
            (patches, values), `image_grid_thw` (pictures, 3), `num_images`; `mm_token_type_ids` (B, P + T).

        Raises
        ------
        UnusableData
            When a prompt's image tokens do not fit its pictures, or a completion holds a vision token (L26).
        """
        self._check(items)
        prompts = [item.rollout.prompt_ids for item in items]
        completions = [item.rollout.token_ids for item in items]
        prompt_ids = _padded(prompts, self._pad_id, torch.long, left=True)
        completion_ids = _padded(completions, self._pad_id, torch.long)
        weights = torch.tensor([[item.weight] for item in items])
        mask = _padded([np.ones(len(c), np.int64) for c in completions], 0, torch.long) * weights
        logprobs = _padded([item.rollout.logprobs for item in items], 0.0, torch.float32) * mask
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": _padded([np.ones(len(p), np.int64) for p in prompts], 0, torch.long, left=True),
            "completion_ids": completion_ids,
            "completion_mask": mask,
            "old_per_token_logps": logprobs,
            "advantages": torch.tensor([item.advantage for item in items], dtype=torch.float32),
            "num_items_in_batch": torch.tensor(float(step_tokens)),
            UNITS: [item.rollout.id for item in items],
            **({} if self._pixels is None else self._pictures(items, self._pixels, prompt_ids, completion_ids)),
        }

    def _pictures(
        self, items: Sequence[Item], pixels: Pixels, prompt_ids: torch.Tensor, completion_ids: torch.Tensor
    ) -> Tensors:
        image_id, found = self._image_id, []
        assert image_id is not None, "a model that sees has a token for images"
        for item in items:
            made = pixels(item.rollout.row_id)
            _check_pictures(item, int(np.sum(item.rollout.prompt_ids == image_id)), pixels.tokens(made[1]))
            found.append(made)
        return {
            "pixel_values": torch.cat([values for values, _ in found]),
            "image_grid_thw": torch.cat([grids for _, grids in found]),
            "num_images": [len(grids) for _, grids in found],
            "mm_token_type_ids": torch.cat(
                [torch.eq(prompt_ids, image_id).long(), torch.zeros_like(completion_ids)], dim=1
            ),
        }

    def _check(self, items: Sequence[Item]) -> None:
        for item in items:
            if not self._vision_ids.isdisjoint(item.rollout.token_ids.tolist()):
                raise UnusableData(f"sample {item.rollout.id} holds a vision token, which sampling must ban (L26)")


def _check_pictures(item: Item, tokens: int, expected: int) -> None:
    if tokens != expected:
        raise UnusableData(
            f"the prompt of sample {item.rollout.id} has {tokens} image tokens, but its pictures make {expected}: were "
            "they sampled with other min_pixels or max_pixels, or have the pictures changed?"
        )


def _padded(rows: Sequence[NDArray[Any]], value: float, dtype: torch.dtype, left: bool = False) -> torch.Tensor:
    """Rows as one (B, longest) tensor."""
    longest = max(len(row) for row in rows)
    out = torch.full((len(rows), longest), value, dtype=dtype)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        out[number, place] = torch.as_tensor(row, dtype=dtype)
    return out


def _only(batch: list[Tensors]) -> Tensors:
    return batch[0]
