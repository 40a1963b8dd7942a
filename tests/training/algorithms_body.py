"""The job body of tests/training/algorithms_recipe.py: a few sums, in the columns of every algorithm."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_rl.orchestrate.job import open_job
from tests.training.algorithms_recipe import PROMPTS, SAMPLES, AlgorithmsConfig

UNITS = 21
"""Texts, pairs and questions: no multiple of a step, so that the last one has passes without any."""
MEASURED = 5
"""Pairs that are not trained on: no multiple of a pass."""

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m tests.training.algorithms_body --workspace W --round R`"""
    job = open_job("data", argv)
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = job.config
    assert isinstance(config, AlgorithmsConfig)
    for shard in job.shards():
        measured = [row | {"pair_id": f"v{row['pair_id']}"} for row in pairs()[:MEASURED]]
        tables = {
            "texts.parquet": texts(), "pairs.parquet": pairs(), "validation.parquet": measured,
            "solutions.parquet": solutions(), "graded.parquet": rollouts(Path(config.model.path)),
        }  # fmt: skip
        paths = []
        for name, rows in tables.items():
            paths.append(shard.output(name))
            pq.write_table(pa.Table.from_pylist(rows), paths[-1])
        shard.commit(paths, made_from={})
    return 0


def sums() -> list[tuple[str, str, str]]:
    """Questions, their answers, and wrong ones of other lengths."""
    draw = random.Random(0)
    numbers = [(draw.randrange(50), draw.randrange(50)) for _ in range(UNITS)]
    return [(f"What is {a} + {b}?", str(a + b), f"{a}{b}" * draw.randrange(1, 3)) for a, b in numbers]


def texts() -> list[Row]:
    """What SFT imitates; every third counts half in weighted SFT."""
    return [
        {"text_id": f"t{i}", "prompt": [_user(question)], "completion": answer, "weight": 0.5 if i % 3 == 0 else 1.0}
        for i, (question, answer, _) in enumerate(sums())
    ]


def pairs() -> list[Row]:
    """What DPO prefers."""
    return [
        {"pair_id": f"p{i}", "prompt": [_user(question)], "chosen": answer, "rejected": wrong}
        for i, (question, answer, wrong) in enumerate(sums())
    ]


def solutions() -> list[Row]:
    """What a reward model tells apart: of each question a right solution and one, two or three wrong ones."""
    rows = []
    for i, (question, answer, wrong) in enumerate(sums()):
        for n, text in enumerate([answer, *(wrong * times for times in range(1, 2 + i % 3))]):
            named = {"question_id": f"q{i}", "solution_id": f"q{i}-{n}", "question": question, "solution": text}
            rows.append({**named, "label": int(n == 0), "score": 0.1 * (i % 5) - 0.2 * n})
    return rows


def rollouts(model: Path) -> list[Row]:
    """What the policy is rewarded for: made-up answers with their log-probabilities under the model."""
    import torch
    from transformers import AutoModelForCausalLM

    from hpc_rl.engines.base import banned_ids
    from hpc_rl.engines.loading import load_processor
    from hpc_rl.engines.weights import weights_hash

    draw, tokenizer, digest = random.Random(1), load_processor(model), weights_hash(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    banned = list(banned_ids(str(model), tokenizer))
    rows = []
    for group, (question, answer, _) in enumerate(sums()[:PROMPTS]):
        asked = tokenizer.apply_chat_template([_user(question)], add_generation_prompt=True, return_dict=False)
        for attempt in range(SAMPLES):
            text = answer if attempt == group % SAMPLES else str(draw.randrange(10 ** (attempt + 1)))
            said = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = policy(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
            logits[:, banned] = -torch.inf
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
            rows.append({
                "sample_id": f"r01-{group}-g{attempt}", "row_id": str(group), "role": "model", "group": group,
                "attempt": attempt, "prompt_token_ids": asked, "token_ids": said, "logprobs": logprobs.tolist(),
                "finish_reason": "stop", "weights_hash": digest, "left_out": False,
                "reward_accuracy": float(text == answer), "reward": float(text == answer),
                "reward_correctness": float(text == answer), "reward_score": draw.gauss(0.0, 1.0),
            })  # fmt: skip
    return rows


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


if __name__ == "__main__":
    sys.exit(main())
