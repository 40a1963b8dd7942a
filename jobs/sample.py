"""Job body of the sample stage: G completions of each prompt of a shard, from the speaker after the last round."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.run.seeds import derive

log = logging.getLogger("hpc_rl")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.sample --workspace W --round R`"""
    job = open_job("sample", argv)
    config = job.config
    assert isinstance(config, LewisConfig)
    speaker = None
    for shard in job.shards():
        speaker = speaker or _Speaker(job, config)
        speaker.work(shard)
    return 0


class _Speaker:
    """The round's engine and rows, loaded when the first shard was claimed."""

    def __init__(self, job: Job, config: LewisConfig) -> None:
        from hpc_rl.data.lewis import image_root, read_rows, rows_of_round
        from hpc_rl.engines.opening import open_engine
        from hpc_rl.engines.weights import speaker_weights

        self.job, self.config = job, config
        self.root = image_root(job.ws, config.data.image_root)
        (dataset,) = job.inputs(0, "dataset")
        self.rows = rows_of_round(
            read_rows(dataset.path("train.parquet")),
            job.round,
            prompts_per_round=config.sample.prompts_per_round,
            seed=config.run.seed,
        )
        self.weights = speaker_weights(job.ws, config, job.round - 1)
        started = time.monotonic()
        self.engine = open_engine(
            config.sample.engine,
            config.speaker,
            config.sample,
            base=self.weights.base,
            adapter=self.weights.adapter,
            weights_hash=self.weights.hash,
        )
        self.loading_s = time.monotonic() - started
        log.info("%s is ready after %.1f s, weights %s", config.sample.engine, self.loading_s, self.weights.hash[:16])

    def work(self, shard: Shard) -> None:
        """Sample one shard and commit it."""
        from hpc_rl.data.images import load_image
        from hpc_rl.data.lewis import shard_of
        from hpc_rl.engines.base import Prompt, Request, Sampling, generate
        from hpc_rl.grading.samples import Sample, write_samples

        config, number = self.config, self.job.round
        first = shard.index * config.sample.shard_size
        rows = shard_of(self.rows, shard.index, config.sample.shard_size)
        drawn = [
            (first + place, attempt, derive(config.run.seed, number, "speaker", row.id, attempt), row)
            for place, row in enumerate(rows)
            for attempt in range(config.sample.samples_per_prompt)
        ]
        prompts = {row.id: Prompt.of(row.speaker_problem, load_image(self.root / row.image)) for row in rows}
        shard.progress(0, len(drawn))
        started = time.monotonic()
        completions = generate(
            self.engine,
            [Request(prompts[row.id], seed) for _, _, seed, row in drawn],
            Sampling(config.sample.temperature, config.sample.max_tokens),
        )
        took_s = time.monotonic() - started
        samples = [
            Sample(
                sample_id=f"r{number:02d}-{row.id}-g{attempt}",
                row_id=row.id,
                role="speaker",
                group=group,
                attempt=attempt,
                accepted=True,
                prompt_token_ids=made.prompt_token_ids,
                token_ids=made.token_ids,
                logprobs=made.logprobs,
                text=made.text,
                finish_reason=made.finish_reason,
                seed=seed,
                weights_hash=self.weights.hash,
            )
            for (group, attempt, seed, row), made in zip(drawn, completions, strict=True)
        ]
        path = shard.output("samples.parquet")
        write_samples(path, samples, Sample)
        tokens = sum(len(sample.token_ids) for sample in samples)
        shard.commit(
            [path],
            made_from={
                "weights": self.weights.hash,
                "engine": config.sample.engine,
                "temperature": config.sample.temperature,
                "seeds": "derive(run seed, round, 'speaker', row id, attempt)",
            },
            metrics={
                "prompts": len(rows),
                "samples": len(samples),
                "tokens": tokens,
                "tokens_per_s": round(tokens / took_s, 1),
                "cut_off": sum(sample.finish_reason == "length" for sample in samples),
                "loading_s": round(self.loading_s, 1),
                "sampling_s": round(took_s, 2),
            },
        )


if __name__ == "__main__":
    sys.exit(main())
