"""Run by test_reward_model.py in a process of its own: score token ids with vLLM, write the logits as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hpc_rl.engines.reward_model import VllmJudge


def main(model: str, rows: str, out: str) -> None:
    """Logits by the number type."""
    asked = json.loads(Path(rows).read_text())
    found = {dtype: VllmJudge(model, dtype=dtype).logits(asked) for dtype in ("float32", "bfloat16")}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
