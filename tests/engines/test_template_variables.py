"""Variables of a model's chat template (`chat_template_kwargs`) change its prompts in every phase alike."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from hpc_rl.config.modeling import VisionModelConfig
from hpc_rl.config.phases import SamplingConfig
from hpc_rl.engines.base import Prompt, Request, Sampling, generate
from hpc_rl.engines.engine_spec import EngineSpec
from hpc_rl.engines.loading import ModelFolderError, load_processor
from hpc_rl.engines.opening import open_engine
from hpc_rl.engines.weights import Weights
from hpc_rl.sampling.prompt_lengths import PromptReader
from hpc_rl.sampling.prompts import check_prompts
from hpc_rl.training.data.columns import CHAT, STRING, Rows
from hpc_rl.training.data.encoding import Encoder

from .conftest import NO_THOUGHTS, PIXELS, TEXT

CHAT_OF_TEXT = [{"role": "user", "content": TEXT}]


def test_engine_check_and_training_read_the_same_prompt(speaker_folder: Path) -> None:
    prompt, processor = Prompt(tuple(CHAT_OF_TEXT)), load_processor(speaker_folder, **PIXELS)
    plain = VisionModelConfig(path=str(speaker_folder), dtype="float32", **PIXELS)
    read = []
    for model in (plain, plain.model_copy(update={"chat_template_kwargs": NO_THOUGHTS})):
        sample, weights = SamplingConfig(engine="transformers"), Weights(str(speaker_folder), None, "")
        opened = open_engine(EngineSpec("transformers", model, sample, weights))
        (made,) = generate(opened, [Request(prompt, 1)], Sampling(1.0, 1))
        opened.close()
        variables = model.chat_template_kwargs
        assert PromptReader(str(speaker_folder), *model.pixels, variables).exactly([prompt]) == [
            len(made.prompt_token_ids)
        ]
        rows = Rows(speaker_folder, 0, "id", pa.record_batch({
            "id": ["a"], "prompt": pa.array([CHAT_OF_TEXT], CHAT), "completion": pa.array(["yes"], STRING),
        }))  # fmt: skip
        assert Encoder(processor, variables).prompts(rows, "prompt") == [list(made.prompt_token_ids)]
        read.append(processor.tokenizer.decode(made.prompt_token_ids))
    assert read[1] == f"{read[0]}<think></think>"


def test_a_check_counts_what_a_variable_adds(speaker_folder: Path) -> None:
    prompts, sampling = [("r0", Prompt(tuple(CHAT_OF_TEXT)))], Sampling(1.0, 8)
    (tokens,) = PromptReader(str(speaker_folder)).exactly([prompts[0][1]])
    tight = {"max_model_len": tokens + 8, "how": "truncate_left"}
    assert not check_prompts(prompts, str(speaker_folder), sampling, **tight).long
    assert check_prompts(prompts, str(speaker_folder), sampling, variables=NO_THOUGHTS, **tight).long == {"r0"}


def test_a_variable_that_the_template_does_not_read_is_refused(speaker_folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="reads no variable 'enable_thinkin': correct the name"):
        PromptReader(str(speaker_folder), variables={"enable_thinkin": False})
