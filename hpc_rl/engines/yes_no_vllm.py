"""P(yes) of a vision-language model about an image, by one forward pass of vLLM (L2).

One token is asked for, and the log-probabilities of all yes and no forms at its place. P(yes) is the same as in
`hpc_rl.engines.yes_no`: the softmax's normaliser cancels. The image stands first in the prompt and has a name of its
own, so vLLM's caches have it ready for the next question: processed, encoded, and read as far as the question.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from hpc_rl.engines.base import NO_VARIABLES
from hpc_rl.engines.loading import load_processor
from hpc_rl.engines.vllm_start import start_vllm
from hpc_rl.engines.yes_no_prompts import Unscorable, YesNoPrompts


@dataclass(frozen=True)
class NamedImage:
    """An image, ready for any number of questions.

    Attributes
    ----------
    picture
        As it was decoded: vLLM may have dropped what it made of it.
    name
        By which vLLM's caches know it; no other image has had it.
    tokens
        How many image tokens stand for it in the prompt.
    """

    picture: Image.Image
    name: str
    tokens: int

    @property
    def nbytes(self) -> int:
        """Memory that it holds here; vLLM bounds its own caches."""
        return self.picture.width * self.picture.height * len(self.picture.getbands())


class YesNoVllm:
    """A listener's model in vLLM. One batch at a time; any thread may run it.

    Parameters
    ----------
    path, dtype, min_pixels, max_pixels
        The config's `listener` section.
    max_model_len
        Longest prompt, in tokens; None = the model's own limit.
    gpu_memory_utilization
        Share of each GPU's memory to take.
    variables
        Of its chat template (`chat_template_kwargs`).
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        min_pixels: int,
        max_pixels: int,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.8,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> None:
        self._processor = load_processor(path, min_pixels, max_pixels)
        self._merge = self._processor.image_processor.merge_size**2
        self._llm = start_vllm(
            path,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs={"min_pixels": min_pixels, "max_pixels": max_pixels},
            enable_prefix_caching=True,
        )
        from vllm import SamplingParams  # only now: vLLM reads its environment when it is imported

        longest = self._llm.llm_engine.model_config.max_model_len - 1  # vLLM has no room for less than one new token
        self.prompts = YesNoPrompts(self._processor, longest, variables)
        forms = [*self.prompts.yes_ids, *self.prompts.no_ids]
        self._sampling = SamplingParams(
            temperature=0.0, max_tokens=1, logprob_token_ids=forms, flat_logprobs=True, detokenize=False
        )

    @property
    def tokens_made(self) -> int:
        """Tokens of all prompts so far, those included that came from vLLM's prefix cache."""
        return self.prompts.tokens_made

    def prepare(self, image: Image.Image) -> NamedImage:
        """An image with a name.

        Raises
        ------
        ValueError
            When the image processor refuses it (for Qwen: an aspect ratio of 200 or more).
        """
        patches: int = self._processor.image_processor.get_number_of_image_patches(image.height, image.width)
        return NamedImage(image, uuid.uuid4().hex, patches // self._merge)

    def encode(self, prepared: Sequence[NamedImage]) -> Sequence[NamedImage]:
        """The same images: vLLM encodes them with their first question."""
        return prepared

    def yes_probabilities(self, pairs: Sequence[tuple[NamedImage, str]]) -> list[float | Unscorable]:
        """P(yes) for each (image, question), NaN where the model's logits are no numbers; or why it cannot be asked."""
        rows = self.prompts.rows([(image.tokens, question) for image, question in pairs])
        prompts = [
            {
                "prompt_token_ids": row,
                "multi_modal_data": {"image": [image.picture]},
                "multi_modal_uuids": {"image": [image.name]},
            }
            for (image, _), row in zip(pairs, rows, strict=True)
            if not isinstance(row, Unscorable)
        ]
        outputs = self._llm.generate(prompts, self._sampling, use_tqdm=False) if prompts else []
        if len(outputs) != len(prompts):  # a batch that failed left some of its questions in the engine
            raise RuntimeError(f"vLLM gave {len(outputs)} answers to {len(prompts)} questions")
        rest = iter(outputs)
        return [row if isinstance(row, Unscorable) else self._read(next(rest)) for row in rows]

    def _read(self, output: Any) -> float:
        (sampled,) = output.outputs
        if sampled.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave a question up: {sampled.finish_reason}")
        found = sampled.logprobs[0]
        forms = (self.prompts.yes_ids, self.prompts.no_ids)
        sides = [torch.tensor([found[token].logprob for token in side]).logsumexp(0) for side in forms]
        return float(torch.stack(sides).softmax(0)[0])
