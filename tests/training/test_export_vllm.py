"""What training leaves is served: adapter, merged model and reward model give in vLLM what they gave in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.training.exporting import export
from tests.training.test_export import base, gathered, trained

__all__ = ["base"]  # a fixture


def test_vllm_answers_as_the_trained_models_did(run_with_vllm: Callable[..., None], base: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    policy, judge = (gathered(trained(base, head, lora=True), base) for head in ("lm", "score"))
    both = export.write(policy, tmp_path / "policy", "t", dtype="float32", export="both")
    reward = export.write(judge, tmp_path / "judge", "t", dtype="float32", export="merged")
    ids = policy.probe.question["input_ids"][0]
    script = Path(__file__).with_name("serve_with_vllm.py")
    run_with_vllm(script, base, both, both / "merged", reward, json.dumps(ids.tolist()), tmp_path / "out")
    found = json.loads((tmp_path / "out").read_text())
    expected = policy.probe.answer.log_softmax(-1)[0, :-1].gather(1, ids[1:, None])[:, 0].tolist()
    assert found["adapter"] == pytest.approx(expected, abs=1e-3)
    assert found["merged"] == pytest.approx(expected, abs=1e-3)
    assert found["score"] == pytest.approx([float(judge.probe.answer)], abs=1e-3)
