"""The job body of benchmarks/training_recipe.py: rows of random token ids, all of one length, for each algorithm."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_recipe import FILES, GROUP, TrainingConfig, units
from hpc_rl.orchestrate.job import open_job

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.training_body --workspace W --round R`"""
    job = open_job("data", argv)
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = job.config
    assert isinstance(config, TrainingConfig)
    for shard in job.shards():
        paths = []
        for algorithm, name in FILES.items():
            paths.append(shard.output(name))
            pq.write_table(pa.Table.from_pylist(rows(config, algorithm)), paths[-1])
        shard.commit(paths, made_from={})
    return 0


def rows(config: TrainingConfig, algorithm: str) -> list[Row]:
    """Data of an algorithm, in the columns that it reads."""
    from transformers import AutoTokenizer

    from hpc_rl.engines.weights import weights_hash

    draw = random.Random(0)
    known = sorted(set(range(len(tokenizer := AutoTokenizer.from_pretrained(config.model.path)))))
    words = [token for token in known if token not in tokenizer.added_tokens_decoder]
    asked, said = config.data.prompt_tokens, config.data.completion_tokens
    digest = weights_hash(Path(config.model.path)) if algorithm == "grpo" else ""
    made: list[Row] = []
    for number in range(units(config, algorithm)):
        ids = {name: draw.choices(words, k=k) for name, k in (("prompt", asked), ("one", said), ("other", said))}
        row: Row
        if algorithm == "sft":
            row = {"text_id": f"t{number}", "completion_token_ids": ids["one"]}
        elif algorithm == "dpo":
            row = {"pair_id": f"p{number}", "chosen_token_ids": ids["one"], "rejected_token_ids": ids["other"]}
        else:
            group, attempt = divmod(number, GROUP)
            reward = float(attempt < GROUP // 2)
            row = {
                "sample_id": f"r01-{group}-g{attempt}", "row_id": str(group), "role": "model", "group": group,
                "attempt": attempt, "token_ids": ids["one"], "logprobs": [-math.log(len(known))] * said,
                "finish_reason": "stop", "weights_hash": digest, "left_out": False, "reward_accuracy": reward,
                "reward": reward,
            }  # fmt: skip
        made.append({"prompt_token_ids": ids["prompt"], **row})
    return made


if __name__ == "__main__":
    sys.exit(main())
