"""A pool of the engines that jobs use: the samples are those of one engine, with transformers and with vLLM."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from hpc_rl.config.gpu_shares import GpuShareError
from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.base import Completion, Sampling, generate
from hpc_rl.engines.engine_spec import EngineSpec
from hpc_rl.engines.node_disk import NoNodeFolder
from hpc_rl.engines.opening import open_engine
from hpc_rl.engines.pool import EnginePool
from hpc_rl.engines.pool_opening import OpenEngine, open_pool
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.engines.weights import Weights

from .conftest import PIXELS, by_path, requests
from .pools import finish, submit, workers_of

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
    spec = spec_of(speaker_folder, kind, data_parallel_size=2, max_num_seqs=8, stage_to=str(tmp_path / "node"))
    with open_pool(spec) as pool:
        assert pool.capacity == 16 and pool.description["engine"] == kind and pool.loading["engine"] > 0
        pool.wait_until_all_are_ready()
        made = generate(pool, by_path(requests(), tmp_path), SAMPLING)
        assert all(worker.completions >= 4 and worker.deaths == 0 for worker in pool.workers)
    for one, other in zip(made, alone, strict=True):
        assert (one.prompt_token_ids, one.token_ids, one.text) == (other.prompt_token_ids, other.token_ids, other.text)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("kind", ["transformers", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def test_a_worker_that_is_stopped_in_the_middle_changes_no_sample(
    speaker_folder: Path, temporary: Path, kind: str
) -> None:
    asked = by_path(requests(12), temporary.parent)
    spec = spec_of(speaker_folder, kind, max_num_seqs=4)
    with EnginePool(OpenEngine(spec), 2, gpus=[(), ()], pauses_s=(0.0,), patience_s=10.0) as pool:
        pool.wait_until_all_are_ready()
        submit(pool, asked, SAMPLING)
        made = dict(pool.step())
        while not made:
            made = dict(pool.step())
        os.kill(workers_of(temporary)[0], signal.SIGSTOP)
        made |= finish(pool)
        assert sorted((worker.deaths, worker.hung) for worker in pool.workers) == [(0, 0), (1, 1)]
        assert max(worker.returned for worker in pool.workers) >= 4
        undisturbed = generate(pool, asked, SAMPLING)
    assert [made[str(place)].token_ids for place in range(len(asked))] == [one.token_ids for one in undisturbed]


def test_a_batch_that_takes_long_tells_that_it_gets_on(speaker_folder: Path) -> None:
    engine = open_engine(spec_of(speaker_folder, "transformers"))
    told: list[int] = []
    engine.tell_progress(lambda: told.append(engine.unfinished))
    (made,) = generate(engine, requests(1)[:1], SAMPLING)
    assert told == [1] * len(made.token_ids)
    engine.close()


def spec_of(folder: Path, kind: str, **more: object) -> EngineSpec:
    """An engine with the speaker of that folder."""
    speaker = SpeakerConfig(path=str(folder), dtype="float32", **PIXELS)
    sample = SampleConfig(engine=kind, max_tokens=12, max_model_len=256, **more)  # type: ignore[arg-type]
    return EngineSpec(sample.engine, speaker, sample, Weights(str(folder), None, "0" * 64))


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
