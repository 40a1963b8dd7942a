"""A pool of the engines that jobs use: the samples are those of one engine, with transformers and with vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hpc_rl.config.gpu_shares import GpuShareError
from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.base import Completion, Sampling, generate
from hpc_rl.engines.engine_spec import EngineSpec
from hpc_rl.engines.node_disk import NoNodeFolder
from hpc_rl.engines.pool_opening import open_pool
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.engines.weights import Weights

from .conftest import PIXELS, by_path, requests

SAMPLING = Sampling(1.0, 12)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


@pytest.fixture(scope="module")
def alone(speaker_folder: Path) -> list[Completion]:
    """What one engine makes of all requests."""
    return generate(TransformersEngine(str(speaker_folder), **PIXELS), requests(), SAMPLING)


@pytest.mark.parametrize("kind", ["transformers", pytest.param("vllm", marks=needs_vllm)])
def test_a_pool_draws_the_samples_of_one_engine(
    speaker_folder: Path, alone: list[Completion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    speaker = SpeakerConfig(path=str(speaker_folder), dtype="float32", **PIXELS)
    sample = SampleConfig(
        engine=kind,  # type: ignore[arg-type]
        data_parallel_size=2,
        max_num_seqs=8,
        max_tokens=12,
        max_model_len=256,
        stage_to=str(tmp_path / "node"),
    )
    with open_pool(EngineSpec(sample.engine, speaker, sample, Weights(str(speaker_folder), None, "0" * 64))) as pool:
        assert pool.capacity == 16 and pool.description["engine"] == kind and pool.loading["engine"] > 0
        pool.wait_until_all_are_ready()
        made = generate(pool, by_path(requests(), tmp_path), SAMPLING)
        assert all(worker.completions >= 4 and worker.deaths == 0 for worker in pool.workers)
    for one, other in zip(made, alone, strict=True):
        assert (one.prompt_token_ids, one.token_ids, one.text) == (other.prompt_token_ids, other.token_ids, other.text)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_gpus_and_folders_that_are_not_there_are_told_before_anything_is_started(
    speaker_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.delenv("NODE_DISK", raising=False)
    speaker = SpeakerConfig(path=str(speaker_folder))
    uneven, unset = SampleConfig(data_parallel_size=2), SampleConfig(data_parallel_size=3, stage_to="$NODE_DISK")
    for sample, error in ((uneven, GpuShareError), (unset, NoNodeFolder)):
        with pytest.raises(error):
            open_pool(EngineSpec("vllm", speaker, sample, Weights(str(speaker_folder), None, "")))
