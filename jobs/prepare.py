"""Build the games of one category per shard: render (tiny runs), catalog, embed, choose negatives, write rows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data import scenes
from hpc_rl.data.embedding import Embedder, embed_concepts
from hpc_rl.data.games import build_games, share_of
from hpc_rl.data.image_folder import catalog
from hpc_rl.data.lewis import SETS, image_root, write_rows
from hpc_rl.orchestrate.job import open_job

log = logging.getLogger("hpc_rl")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prepare --workspace W --round 0`"""
    job = open_job("prepare", argv)
    assert isinstance(job.config, LewisConfig)
    data = job.config.data
    assert data.categories is not None, "categories are resolved at launch"
    root = image_root(job.ws, data.image_root)
    numbers = {"train": data.train_rows, "new_views": data.eval_rows.new_views, "validation": data.eval_rows.validation}
    embedder = None
    for shard in job.shards():
        category = data.categories[shard.index]
        pictures = 0
        if data.scenes is not None:
            views = {"train": data.scenes.views_train, "test": data.scenes.views_test}
            pictures = scenes.render_category(root, data.split_seed, category, views, data.scenes.size)
        found = catalog(
            root,
            category,
            k=data.k,
            validation_fraction=data.validation_fraction,
            split_seed=data.split_seed,
            new_views_per_concept=data.new_views_per_concept,
            skip_unreadable=data.unreadable_image == "skip",
        )
        for path in found.skipped:
            log.warning("left out, unreadable: %s", root / path)
        embedder = embedder or Embedder(
            data.embedding.path or job.config.speaker.path,
            min_pixels=job.config.speaker.min_pixels,
            max_pixels=job.config.speaker.max_pixels,
        )
        embeddings = embed_concepts(embedder, root, {concept.name: concept.train_views for concept in found.concepts})
        paths = []
        for name in SETS:
            rows = build_games(
                found,
                embeddings,
                name,
                share_of(numbers[name], shard.index, len(data.categories)),
                k=data.k,
                negatives_from=data.negatives_from,
                seed=data.split_seed,
                speaker_problem=data.speaker_problem,
            )
            paths.append(shard.output(f"{name}.parquet"))
            write_rows(paths[-1], rows)
        shard.commit(
            paths,
            made_from={"category": category, "split_seed": data.split_seed, "embedding": embedder.model_path},
            metrics={
                "training_concepts": sum(not concept.held_out for concept in found.concepts),
                "held_out_concepts": sum(concept.held_out for concept in found.concepts),
                "rendered_pictures": pictures,
                "unreadable_pictures": len(found.skipped),
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
