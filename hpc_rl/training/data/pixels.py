"""Pictures of rows as a vision tower takes them, and whether they fit the tokens that stand for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoConfig

from hpc_rl.training.base import Tensors
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.task import find

if TYPE_CHECKING:
    from hpc_rl.training.run import TrainRun

ImagesOf = Callable[[str], Sequence[Image.Image]]
"""From a row's id to its pictures, in the order in which the prompt has them."""

CACHE_BYTES = 256 * 2**20


class Pictures:
    """Pictures of rows, as tensors. Those used last are kept: a group's samples share theirs.

    Parameters
    ----------
    image_processor
        Of the model, with the run's pixel limits.
    images_of
        Loads a row's pictures.
    image_id
        The token that stands for image features.
    """

    def __init__(
        self, image_processor: Any, images_of: ImagesOf, image_id: int, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._processor, self._images_of, self._room = image_processor, images_of, cache_bytes
        self.image_id = image_id
        self._kept: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def __call__(self, rows: Sequence[tuple[str, str, NDArray[np.int32]]]) -> Tensors:
        """The pictures of some prompts.

        Parameters
        ----------
        rows
            For each prompt: the id of its unit, for messages; that of its row; its tokens.

        Returns
        -------
        dict
            `pixel_values` (patches, values), `image_grid_thw` (pictures, 3), `num_images`, by prompt.

        Raises
        ------
        UnusableData
            When a prompt's row has no pictures, or its image tokens do not fit them.
        """
        found = [self.of(row) for _, row, _ in rows]
        for (unit, row, prompt), (_, grids) in zip(rows, found, strict=True):
            if not len(grids):
                raise UnusableData(
                    f"row {row!r}, of which {unit} is, has no pictures: rows with pictures and rows without are not "
                    "trained together. Leave it out, or train each kind in a stage of its own"
                )
            tokens, expected = int(np.sum(prompt == self.image_id)), self._tokens(grids)
            if tokens != expected:
                raise UnusableData(
                    f"the prompt of {unit} has {tokens} image tokens, but its pictures make {expected}: was it made "
                    "with other min_pixels or max_pixels, or have the pictures changed?"
                )
        return {
            "pixel_values": torch.cat([values for values, _ in found]),
            "image_grid_thw": torch.cat([grids for _, grids in found]),
            "num_images": [len(grids) for _, grids in found],
        }

    def of(self, row_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (N, values) of all pictures of a row, and their grids (pictures, 3); a row may have none."""
        if row_id in self._kept:
            self._kept.move_to_end(row_id)
            return self._kept[row_id]
        images = list(self._images_of(row_id))
        if not images:  # no image processor takes that
            return torch.empty(0, 0), torch.empty(0, 3, dtype=torch.long)
        made = self._processor(images=images, return_tensors="pt")
        found = self._kept[row_id] = (made["pixel_values"], made["image_grid_thw"])
        self._room -= found[0].nbytes
        while self._room < 0 and len(self._kept) > 1:
            self._room += self._kept.popitem(last=False)[1][0].nbytes
        return found

    def _tokens(self, grids: torch.Tensor) -> int:
        return int(grids.prod(-1).sum()) // int(self._processor.merge_size) ** 2


def pictures(run: TrainRun, processor: Any) -> Pictures | None:
    """The pictures of a training's rows; None where it has texts alone."""
    if run.task.pictures is None:
        return None
    config = AutoConfig.from_pretrained(run.start.base, local_files_only=True)
    return Pictures(processor.image_processor, find(run.task.pictures)(run.job), config.image_token_id)
