"""P(yes) of a vision-language model about an image, by one forward pass (L2).

The first answer token's logits are enough: P(yes) = softmax over [yes, no], where each side is the log-sum-exp of the
logits of all tokens that spell it (`yes`, ` yes`, `Yes`, …), so P(yes) = Σ p(yes forms) / Σ p(yes and no forms). All
softmax arithmetic is float32.

For Qwen2-VL and Qwen2.5-VL an image is encoded once: its features are put in place of the image tokens, for as many
questions as there are. Other families take pixels with each question.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from hpc_rl.engines.base import NO_VARIABLES
from hpc_rl.engines.loading import load_model, load_processor, pick_device
from hpc_rl.engines.yes_no_prompts import Unscorable, YesNoPrompts

log = logging.getLogger(__name__)

FEATURE_FAMILIES = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Families whose language model sees an image only through its features and the M-RoPE positions."""


@dataclass(frozen=True)
class EncodedImage:
    """An image, ready for any number of questions.

    Attributes
    ----------
    data
        (N, hidden) features of its N image tokens where the family allows it, else (patches, dim) pixel values.
    grid
        (3,) frames, patch rows, patch columns.
    tokens
        N, how many image tokens stand for it in the prompt.
    """

    data: torch.Tensor
    grid: torch.Tensor
    tokens: int

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self.data.numel() * self.data.element_size()


class YesNoModel:
    """A listener's model.

    Parameters
    ----------
    path, dtype, attention, min_pixels, max_pixels
        The config's `listener` section.
    max_model_len
        Longest prompt, in tokens; None = the model's own limit.
    max_pass_tokens
        Most tokens, padding included, in one forward pass; and most image tokens in one of the vision tower.
    cache_features
        None = where the family allows it.
    variables
        Of its chat template (`chat_template_kwargs`).
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        attention: str = "auto",
        min_pixels: int,
        max_pixels: int,
        max_model_len: int | None = None,
        max_pass_tokens: int = 1 << 16,
        cache_features: bool | None = None,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> None:
        self.device = pick_device()
        self._processor = load_processor(path, min_pixels, max_pixels)
        self._model: Any = load_model(path, dtype, attention, self.device)
        family = self._model.config.model_type
        self._by_features = family in FEATURE_FAMILIES if cache_features is None else cache_features
        if not self._by_features:
            log.info("image features of %s are not kept: each question encodes its image anew", family)
        self._merge = self._processor.image_processor.merge_size**2
        self._max_pass_tokens = max_pass_tokens
        own_limit: int = self._model.config.get_text_config().max_position_embeddings
        self.prompts = YesNoPrompts(self._processor, min(own_limit, max_model_len or own_limit), variables)

    @property
    def tokens_made(self) -> int:
        """Tokens of all prompts so far."""
        return self.prompts.tokens_made

    def prepare(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixel values (patches, dim) and grid (3,) of one image, resized to the pixel limits.

        Raises
        ------
        ValueError
            When the image processor refuses it (for Qwen: an aspect ratio of 200 or more).
        """
        made = self._processor.image_processor(images=[image], return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"][0]

    @torch.inference_mode()
    def encode(self, pixels: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[EncodedImage]:
        """Encode images, in passes of the vision tower that are bounded as those of the language model are."""
        if not pixels:
            return []
        sizes = [int(grid.prod()) // self._merge for _, grid in pixels]
        if not self._by_features:
            return [EncodedImage(p, grid, n) for (p, grid), n in zip(pixels, sizes, strict=True)]
        encoded: dict[int, EncodedImage] = {}
        for chosen in passes(sizes, self._max_pass_tokens):
            values = torch.cat([pixels[index][0] for index in chosen]).to(self.device)
            grids = torch.stack([pixels[index][1] for index in chosen]).to(self.device)
            features = self._model.get_image_features(values, grids).pooler_output
            for index, found in zip(chosen, features, strict=True):
                encoded[index] = EncodedImage(found.clone(), pixels[index][1], sizes[index])
        return [encoded[index] for index in range(len(pixels))]

    @torch.inference_mode()
    def yes_probabilities(self, pairs: Sequence[tuple[EncodedImage, str]]) -> list[float | Unscorable]:
        """P(yes) for each (image, question), NaN where the model's logits are no numbers; or why it cannot be asked.

        A forward pass takes prompts of similar length, so that one long question does not pad all the others.
        """
        rows = self.prompts.rows([(image.tokens, question) for image, question in pairs])
        answers: list[float | Unscorable] = [row if isinstance(row, Unscorable) else math.nan for row in rows]
        asked = [
            (place, image, self._expand(row, image))
            for place, ((image, _), row) in enumerate(zip(pairs, rows, strict=True))
            if not isinstance(row, Unscorable)
        ]
        for chosen in passes([len(row) for _, _, row in asked], self._max_pass_tokens):
            places, images, ids = zip(*(asked[index] for index in chosen), strict=True)
            for place, p in zip(places, self._forward(images, ids), strict=True):
                answers[place] = p
        return answers

    def _expand(self, row: Sequence[int], image: EncodedImage) -> list[int]:
        """The prompt with as many image tokens as the image has."""
        place = row.index(self.prompts.image_id)
        return [*row[:place], *[self.prompts.image_id] * image.tokens, *row[place + 1 :]]

    def _forward(self, images: Sequence[EncodedImage], rows: Sequence[Sequence[int]]) -> list[float]:
        """P(yes) of each prompt, (B,), in one forward pass."""
        ids, mask = self._padded(rows)
        grids = torch.stack([image.grid for image in images]).to(self.device)
        data = torch.cat([image.data for image in images]).to(self.device)
        is_image = ids == self.prompts.image_id
        inputs: dict[str, Any] = {"attention_mask": mask, "logits_to_keep": 1, "use_cache": False}
        if self._by_features:
            words = self._model.get_input_embeddings()(ids)
            inputs["inputs_embeds"] = words.masked_scatter(is_image[..., None], data.to(words.dtype))
            inputs["position_ids"], _ = self._model.model.get_rope_index(
                ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=mask
            )
        else:
            inputs |= {"input_ids": ids, "pixel_values": data, "image_grid_thw": grids}
            inputs["mm_token_type_ids"] = is_image.int()
        logits = self._model(**inputs).logits[:, -1].float()
        forms = (self.prompts.yes_ids, self.prompts.no_ids)
        sides = torch.stack([logits[:, list(side)].logsumexp(-1) for side in forms], dim=-1)
        found: list[float] = sides.softmax(-1)[:, 0].tolist()
        return found

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (B, L), padded on the left."""
        longest = max(map(len, rows))
        pad = self._processor.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.device), mask.to(self.device)


def passes(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Which prompts go through the model together, as indices: similar lengths, at most `max_tokens` with padding.

    One that is longer by itself goes alone.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        if found and length <= 2 * lengths[found[-1][0]] and (len(found[-1]) + 1) * length <= max_tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found
