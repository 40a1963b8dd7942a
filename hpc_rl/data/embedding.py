"""Embeddings of pictures from the vision tower of a model folder, by which hard negatives are found."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_rl.data.images import load_image


class Embedder:
    """A loaded vision tower.

    Parameters
    ----------
    model_path : str
        A Hugging Face folder: a vision-language model (`AutoModelForImageTextToText`, whose image tokens are
        averaged) or a model of the CLIP kind (`AutoModel` with `get_image_features`).
    device : str or None
        `cpu` (in float32) or `cuda` (in bfloat16); None takes a GPU where there is one.
    min_pixels, max_pixels : int or None
        Pixel limits of processors that know them; None keeps the folder's own.

    Raises
    ------
    ValueError
        If the model gives no image features.
    """

    def __init__(
        self,
        model_path: str,
        *,
        device: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        config = AutoConfig.from_pretrained(model_path, local_files_only=True)
        loader = AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModel
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._model: Any = loader.from_pretrained(model_path, dtype=dtype, local_files_only=True).eval().to(device)
        if not hasattr(self._model, "get_image_features"):
            raise ValueError(
                f"{model_path} ({config.model_type}) has no get_image_features; set data.embedding.path to a "
                "vision-language or CLIP-like model"
            )
        self._processor: Any = AutoImageProcessor.from_pretrained(model_path, local_files_only=True)
        if hasattr(self._processor, "merge_size"):  # the Qwen-VL kind, whose sizes are numbers of pixels, not sides
            size = dict(self._processor.size)
            self._processor.size = {
                "shortest_edge": min_pixels or size["shortest_edge"],
                "longest_edge": max_pixels or size["longest_edge"],
            }
        self._wanted = set(inspect.signature(self._model.get_image_features).parameters)
        self._device = device

    def embed(self, paths: Sequence[Path], batch_size: int = 32) -> npt.NDArray[np.float32]:
        """Embed pictures.

        Returns
        -------
        ndarray (N, D)
            Unit vectors, in the order of `paths`.
        """
        rows = [row for batch in _batches(paths, batch_size) for row in self._embed_batch(batch)]
        return np.stack(rows)

    def inputs(self, paths: Sequence[Path]) -> dict[str, Any]:
        """What the vision tower is given for some pictures: tensors on its device, `pixel_values` among them."""
        made = self._processor(images=[load_image(path) for path in paths], return_tensors="pt")
        return {name: value.to(self._device) for name, value in made.items() if name in self._wanted}

    def _embed_batch(self, paths: Sequence[Path]) -> Iterator[npt.NDArray[np.float32]]:
        import torch

        with torch.inference_mode():
            features = self._model.get_image_features(**self.inputs(paths))
        features = getattr(features, "pooler_output", features)
        for feature in features:  # (D,) of CLIP, or (tokens, D) of a vision-language model
            vector = feature.float().reshape(-1, feature.shape[-1]).mean(0).cpu().numpy()
            yield unit(vector)


def unit(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The vector scaled to length 1, float32; zero stays zero."""
    length = float(np.linalg.norm(vector))
    scaled: npt.NDArray[np.float32] = (vector / length if length > 0 else vector).astype(np.float32)
    return scaled


def embed_concepts(
    embedder: Embedder, root: Path, views: Mapping[str, Sequence[str]], batch_size: int = 32
) -> dict[str, npt.NDArray[np.float32]]:
    """One embedding per concept: the mean over its views, scaled to length 1.

    Parameters
    ----------
    embedder : Embedder
        The vision tower.
    root : pathlib.Path
        Where the paths of `views` start.
    views : mapping of str to sequence of str
        Pictures by concept.
    """
    flat = [root / path for paths in views.values() for path in paths]
    rows = iter(embedder.embed(flat, batch_size))
    return {name: unit(np.mean([next(rows) for _ in paths], axis=0)) for name, paths in views.items()}


def _batches(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), size):
        yield paths[start : start + size]
