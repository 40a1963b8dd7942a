"""The vLLM engine, run once in a process of its own: it agrees with the transformers engine sample by sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.engines.base import Completion, Sampling, banned_ids, generate
from hpc_rl.engines.loading import load_processor
from hpc_rl.engines.transformers_engine import TransformersEngine

from .conftest import PIXELS, requests

pytest.importorskip("vllm", reason="vLLM is not installed here")


@pytest.fixture(scope="module")
def sampled(speaker_folder: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `sample_with_vllm.py` got: completions by the name of the run."""
    out = tmp_path_factory.mktemp("vllm") / "completions.json"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}:{here.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "sample_with_vllm.py"), str(speaker_folder), str(adapter_folder), str(out)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {name: [_completion(c) for c in cs] for name, cs in json.loads(out.read_text()).items()}


def _completion(data: dict[str, Any]) -> Completion:
    return Completion(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def assert_same_samples(one: Sequence[Completion], other: Sequence[Completion]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.prompt_token_ids == b.prompt_token_ids
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize(("run", "temperature"), [("plain", 1.0), ("cool", 0.6), ("greedy", 0.0)])
def test_both_engines_draw_the_same_samples(sampled: Any, speaker_folder: Path, run: str, temperature: float) -> None:
    other = TransformersEngine(str(speaker_folder), **PIXELS)
    assert_same_samples(sampled[run], generate(other, requests(), Sampling(temperature, 12)))


def test_more_prompts_than_one_step_reads_are_all_answered(sampled: Any) -> None:
    assert len(sampled["many"]) == 400 and sum(len(c.prompt_token_ids) for c in sampled["many"]) > 4096
    assert [c.token_ids for c in sampled["many"][:4]] == [c.token_ids[:2] for c in sampled["plain"][:4]]


def test_a_lora_request_is_what_peft_computes(sampled: Any, speaker_folder: Path, adapter_folder: Path) -> None:
    other = TransformersEngine(str(speaker_folder), adapter_folder, **PIXELS)
    assert_same_samples(sampled["adapter"], generate(other, requests(), Sampling(1.0, 12)))
    assert [c.token_ids for c in sampled["adapter"]] != [c.token_ids for c in sampled["plain"]]


def test_samples_do_not_depend_on_what_the_engine_did_before(sampled: Any) -> None:
    assert sampled["after others"] == sampled["plain"]
    assert [c.token_ids for c in sampled["alone"]] == [c.token_ids for c in sampled["plain"]]


def test_control_tokens_are_never_sampled(sampled: Any, speaker_folder: Path) -> None:
    banned = set(banned_ids(speaker_folder, load_processor(speaker_folder, **PIXELS).tokenizer))
    tokens = [token for completion in sampled["hot"] for token in completion.token_ids]
    assert len(tokens) > 1500 and not set(tokens) & banned
