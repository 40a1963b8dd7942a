"""P(yes) of a vision-language model about an image, by one forward pass (L2).

The first answer token's logits are enough: P(yes) = softmax over [yes, no], where each side is the log-sum-exp of the
logits of all tokens that spell it (`yes`, ` yes`, `Yes`, …), so P(yes) = Σ p(yes forms) / Σ p(yes and no forms). All
softmax arithmetic is float32.

For Qwen2-VL and Qwen2.5-VL an image is encoded once: its features are put in place of the image tokens, for as many
questions as there are. Other families take pixels with each question.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from hpc_rl.engines.loading import ModelFolderError, control_tokens, load_model, load_processor, pick_device

log = logging.getLogger(__name__)

FEATURE_FAMILIES = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Families whose language model sees an image only through its features and the M-RoPE positions."""

_HERE = "\x00question\x00"


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


def surface_forms(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Ids of all single tokens that spell `word`, whatever their case and the white space around it.

    Raises
    ------
    ModelFolderError
        When there is none: then P(yes) cannot be read off one token.
    """
    control = set(tokenizer.all_special_ids)
    ids = [index for index in range(len(tokenizer)) if index not in control]
    texts = tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
    forms = tuple(index for index, text in zip(ids, texts, strict=True) if text.strip().lower() == word)
    if not forms:
        raise ModelFolderError(f"no token of {tokenizer.name_or_path} spells {word!r}: this model cannot be a listener")
    return forms


class YesNoModel:
    """A listener's model.

    Parameters
    ----------
    path, dtype, attention, min_pixels, max_pixels
        The config's `listener` section.
    cache_features
        None = where the family allows it.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        attention: str = "auto",
        min_pixels: int,
        max_pixels: int,
        cache_features: bool | None = None,
    ) -> None:
        self.device = pick_device()
        self._processor = load_processor(path, min_pixels, max_pixels)
        self._model: Any = load_model(path, dtype, attention, self.device)
        family = self._model.config.model_type
        self._by_features = family in FEATURE_FAMILIES if cache_features is None else cache_features
        if not self._by_features:
            log.info("image features of %s are not kept: each question encodes its image anew", family)
        self._image_id: int = self._model.config.image_token_id
        self._merge = self._processor.image_processor.merge_size**2
        self._control = control_tokens(self._processor)
        self._head, self._tail = self._template()
        self.yes_ids = surface_forms(self._processor.tokenizer, "yes")
        self.no_ids = surface_forms(self._processor.tokenizer, "no")
        log.info("yes is spelt by tokens %s, no by %s", self.yes_ids, self.no_ids)

    def _template(self) -> tuple[str, str]:
        """The prompt before and after the question."""
        content = [{"type": "image"}, {"type": "text", "text": _HERE}]
        prompt: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        head, _, tail = prompt.partition(_HERE)
        return head, tail

    def check_question(self, question: str) -> None:
        """Raise ValueError when a question holds text that the tokenizer would take for a control token."""
        for token in self._control:
            if token in question:
                raise ValueError(f"the question holds the control token {token}")

    def prepare_pixels(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
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
        """Encode images, all in one pass of the vision tower."""
        if not pixels:
            return []
        sizes = [int(grid.prod()) // self._merge for _, grid in pixels]
        if not self._by_features:
            return [EncodedImage(p, grid, n) for (p, grid), n in zip(pixels, sizes, strict=True)]
        values = torch.cat([p for p, _ in pixels]).to(self.device)
        grids = torch.stack([grid for _, grid in pixels]).to(self.device)
        features = self._model.get_image_features(values, grids).pooler_output
        return [EncodedImage(f.clone(), grid, n) for f, (_, grid), n in zip(features, pixels, sizes, strict=True)]

    @torch.inference_mode()
    def yes_probabilities(self, pairs: Sequence[tuple[EncodedImage, str]]) -> list[float]:
        """P(yes) for each (image, question), in one forward pass; NaN where the model's logits are no numbers."""
        if not pairs:
            return []
        images = [image for image, _ in pairs]
        ids, mask = self._tokens(pairs)
        grids = torch.stack([image.grid for image in images]).to(self.device)
        data = torch.cat([image.data for image in images]).to(self.device)
        types = (ids == self._image_id).int()
        inputs: dict[str, Any] = {"attention_mask": mask, "logits_to_keep": 1, "use_cache": False}
        if self._by_features:
            words = self._model.get_input_embeddings()(ids)
            inputs["inputs_embeds"] = words.masked_scatter((ids == self._image_id)[..., None], data.to(words.dtype))
            positions, _ = self._model.model.get_rope_index(
                ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask
            )
            inputs["position_ids"] = positions
        else:
            inputs |= {"input_ids": ids, "pixel_values": data, "image_grid_thw": grids, "mm_token_type_ids": types}
        logits = self._model(**inputs).logits[:, -1].float()
        sides = torch.stack([logits[:, list(side)].logsumexp(-1) for side in (self.yes_ids, self.no_ids)], dim=-1)
        return [float(p) for p in sides.softmax(-1)[:, 0]]

    def _tokens(self, pairs: Sequence[tuple[EncodedImage, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (B, L), padded on the left, each image token repeated for its image."""
        tokenizer = self._processor.tokenizer
        texts = [self._head + question + self._tail for _, question in pairs]
        rows = []
        for (image, _), row in zip(pairs, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            place = row.index(self._image_id)
            rows.append(row[:place] + [self._image_id] * image.tokens + row[place + 1 :])
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = torch.tensor(row)
            mask[number, longest - len(row) :] = 1
        return ids.to(self.device), mask.to(self.device)
