"""How many tokens the pictures of a prompt are: at most, and exactly, from their sizes alone where that can be."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from hpc_rl.data.images import size_of
from hpc_rl.engines.base import Prompt

LONGEST_ASPECT = 200
"""Width over height that Qwen-VL takes at most, and the other way round."""


class PictureTokens:
    """Counts the tokens of prompts with pictures.

    Attributes
    ----------
    most
        No picture has more tokens; inf for processors that scale pictures otherwise than Qwen-VL's. With it most
        prompts are known to fit, and none of their files is opened: a thousand tasks do that at the same time.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._rule_is_right: bool | None = None  # None: not compared with the processor yet
        self.most = _most_tokens(processor)

    def length(self, prompt: Prompt, rendered: str, words: int) -> int:
        """Tokens of a prompt with pictures.

        They come from the processor's own rule for sizes where that gives what the processor does, which is tried with
        the first prompt. Otherwise the pictures are decoded and processed.

        Parameters
        ----------
        prompt
            With one picture at least.
        rendered
            Its text, with one token in the place of each picture.
        words
            Tokens in this text.

        Raises
        ------
        ValueError
            For a picture that cannot be read, or that the model does not take.
        """
        by_rule = self._by_rule(prompt, words) if self._rule_is_right is not False else None
        if self._rule_is_right and by_rule is not None:
            return by_rule
        read = self._processor(text=[rendered], images=prompt.open_images(), add_special_tokens=False)
        length = len(read["input_ids"][0])
        self._rule_is_right = by_rule == length
        return length

    def _by_rule(self, prompt: Prompt, words: int) -> int | None:
        """Each picture's one token becomes as many as the rule says; None where the processor has no rule."""
        rule = getattr(self._processor, "_get_num_multimodal_tokens", None)
        if rule is None:
            return None
        sizes = [image.size if isinstance(image, Image.Image) else size_of(image) for image in prompt.images]
        counts = rule(image_sizes=[(height, width) for width, height in sizes])["num_image_tokens"]
        return int(words + sum(counts) - len(counts))


def _most_tokens(processor: Any) -> float:
    """The largest number of tokens that Qwen-VL's `smart_resize` makes of any picture.

    It scales a picture to an area between min_pixels and max_pixels, with sides that are multiples of a merged patch.
    On the way down the sides are rounded down, but none to nothing: a narrow picture may stay larger than max_pixels.
    On the way up they are rounded up.
    """
    images: Any = getattr(processor, "image_processor", None)
    options = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    if not {"min_pixels", "max_pixels", "merge_size"} <= set(options):
        return math.inf
    patch = (images.patch_size * images.merge_size) ** 2
    least, most = images.size["shortest_edge"] / patch, images.size["longest_edge"] / patch
    scaled_down = math.sqrt(LONGEST_ASPECT * most) if most < LONGEST_ASPECT else most
    scaled_up = least + math.sqrt(LONGEST_ASPECT * least) + math.sqrt(least / LONGEST_ASPECT) + 1
    return float(max(scaled_down, scaled_up))
