"""One category from pictures to games: what a shard of the `prepare` stage does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.config.lewis import DataConfig
from hpc_rl.data import scenes
from hpc_rl.data.embedding import Embedder, embed_concepts
from hpc_rl.data.games import build_games, share_of
from hpc_rl.data.image_folder import Catalog, catalog
from hpc_rl.data.lewis import SETS, GameRow


@dataclass(frozen=True)
class Prepared:
    """The games of one category by set, the catalog they were made from, and how many pictures were rendered for it."""

    catalog: Catalog
    games: Mapping[str, list[GameRow]]
    rendered: int


def rows_wanted(data: DataConfig) -> dict[str, int]:
    """Games of each set, over all categories."""
    return {"train": data.train_rows, "new_views": data.eval_rows.new_views, "validation": data.eval_rows.validation}


def prepare_category(data: DataConfig, root: Path, index: int, embedder: Embedder) -> Prepared:
    """Render (where the config has scenes), catalog, embed, choose negatives and build games.

    Rows are shared equally between categories, so that a large category does not drown the others.

    Parameters
    ----------
    data : DataConfig
        With its categories resolved.
    root : pathlib.Path
        The image folder.
    index : int
        Number of the category in `data.categories`.
    embedder : Embedder
        Tells which concepts look alike.

    Raises
    ------
    ImageFolderError, UnreadableImage
        As `catalog` and `build_games` do.
    """
    assert data.categories is not None, "categories are resolved at launch"
    category = data.categories[index]
    rendered = 0
    if data.scenes is not None:
        views = {"train": data.scenes.views_train, "test": data.scenes.views_test}
        rendered = scenes.render_category(root, data.split_seed, category, views, data.scenes.size)
    found = catalog(
        root,
        category,
        k=data.k,
        validation_fraction=data.validation_fraction,
        split_seed=data.split_seed,
        new_views_per_concept=data.new_views_per_concept,
        skip_unreadable=data.unreadable_image == "skip",
    )
    embeddings = embed_concepts(embedder, root, {concept.name: concept.train_views for concept in found.concepts})
    wanted = rows_wanted(data)
    games = {
        name: build_games(
            found,
            embeddings,
            name,
            share_of(wanted[name], index, len(data.categories)),
            k=data.k,
            negatives_from=data.negatives_from,
            seed=data.split_seed,
            speaker_problem=data.speaker_problem,
        )
        for name in SETS
    }
    return Prepared(found, games, rendered)
