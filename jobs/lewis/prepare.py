"""Job body of the prepare stage: the games of one category per shard."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data.embedding import Embedder
from hpc_rl.data.lewis import SETS, image_root, write_rows
from hpc_rl.data.preparation import prepare_category
from hpc_rl.engines.gpus import check_gpus
from hpc_rl.orchestrate.job import open_job

log = logging.getLogger("hpc_rl")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.lewis.prepare --workspace W --round 0`"""
    job = open_job("prepare", argv)
    config = job.config
    assert isinstance(config, LewisConfig)
    check_gpus(config, job.stage.name)
    root = image_root(job.ws, config.data.image_root)
    model = str(config.data.embedding.path or config.speaker.path)
    embedder = None
    for shard in job.shards():
        if embedder is None:
            embedder = Embedder(model, min_pixels=config.speaker.min_pixels, max_pixels=config.speaker.max_pixels)
        made = prepare_category(config.data, root, shard.index, embedder)
        for path in made.catalog.skipped:
            log.warning("left out, unreadable: %s", root / path)
        paths = []
        for name in SETS:
            paths.append(shard.output(f"{name}.parquet"))
            write_rows(paths[-1], made.games[name])
        held_out = sum(concept.held_out for concept in made.catalog.concepts)
        shard.commit(
            paths,
            made_from={"category": made.catalog.category, "split_seed": config.data.split_seed, "embedding": model},
            metrics={
                "training_concepts": len(made.catalog.concepts) - held_out,
                "held_out_concepts": held_out,
                "rendered_pictures": made.rendered,
                "unreadable_pictures": len(made.catalog.skipped),
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
