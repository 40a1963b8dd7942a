"""From a catalog and embeddings to games: which concepts are hard to tell apart, and who is shown with whom.

Every choice is made by `seeded_order`, so a game depends on the data seed, the set, the category and its number, and on
nothing else: not on the shard or the machine that built it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hpc_rl.data.image_folder import Catalog, Concept, ImageFolderError
from hpc_rl.data.lewis import GameRow
from hpc_rl.run.seeds import seeded_order


def nearest(
    embeddings: Mapping[str, npt.NDArray[np.float32]], name: str, pool: Sequence[str], number: int
) -> list[str]:
    """The concepts of a pool that look most like one concept.

    Parameters
    ----------
    embeddings : mapping of str to ndarray (D,)
        Unit vectors by concept.
    name : str
        The concept; it is not its own neighbour.
    pool : sequence of str
        Concepts to choose from.
    number : int
        How many.

    Returns
    -------
    list of str
        At most `number` concepts by falling cosine similarity, ties by name.
    """
    similarity = {other: float(embeddings[name] @ embeddings[other]) for other in pool if other != name}
    return sorted(similarity, key=lambda other: (-similarity[other], other))[:number]


def share_of(total: int, index: int, shards: int) -> int:
    """Rows of shard `index` when `total` rows are shared equally; the first shards take the remainder."""
    return total // shards + (index < total % shards)


def build_games(
    catalog: Catalog,
    embeddings: Mapping[str, npt.NDArray[np.float32]],
    set_name: str,
    number: int,
    *,
    k: int,
    negatives_from: int | None,
    seed: int,
    speaker_problem: str,
) -> list[GameRow]:
    """Build one category's games of one set.

    Targets take turns, in a seeded order, so all concepts are targets equally often (±1). The distractors of `train`
    and `new_views` are training concepts; a held-out target is shown among all concepts of the category. Games of
    `train` show training views only, those of `new_views` new views only, those of `validation` new views of training
    concepts (their training views where there are none) and any view of held-out ones.

    Parameters
    ----------
    catalog : Catalog
        The category.
    embeddings : mapping of str to ndarray (D,)
        Unit vectors by concept, for hard negatives.
    set_name : str
        `train`, `new_views` or `validation`.
    number : int
        How many games.
    k : int
        Candidates per game, at most 26.
    negatives_from : int or None
        Draw the k−1 distractors from this many nearest concepts; None takes the k−1 nearest.
    seed : int
        data.split_seed.
    speaker_problem : str
        The speaker's prompt.

    Raises
    ------
    ImageFolderError
        If `negatives_from` is less than k−1.
    """
    if not 2 <= k <= len(string.ascii_uppercase):
        raise ImageFolderError(f"data.k={k}: a game has between 2 and {len(string.ascii_uppercase)} candidates")
    pool_size = k - 1 if negatives_from is None else negatives_from
    if pool_size < k - 1:
        raise ImageFolderError(
            f"data.negatives_from={negatives_from} is less than the {k - 1} distractors of data.k={k}"
        )
    held_out = set_name == "validation"
    pool = [concept for concept in catalog.concepts if held_out or not concept.held_out]
    by_name = {concept.name: concept for concept in pool}
    targets = seeded_order(
        [concept for concept in pool if concept.held_out == held_out],
        seed,
        "targets",
        set_name,
        catalog.category,
        key=_name,
    )
    if not targets:
        return []
    near = {target.name: nearest(embeddings, target.name, list(by_name), pool_size) for target in targets}

    rows = []
    for i in range(number):
        parts = (set_name, catalog.category, i)
        target = targets[i % len(targets)]
        negatives = seeded_order(near[target.name], seed, "negatives", *parts)[: k - 1]
        image, match = seeded_order(_views(target, set_name), seed, "target", *parts)[:2]
        shown = [match] + [seeded_order(_views(by_name[name], set_name), seed, "view", *parts)[0] for name in negatives]
        candidates = tuple(seeded_order(shown, seed, "candidates", *parts))
        label = candidates.index(match)
        names = tuple(string.ascii_uppercase[:k])
        rows.append(
            GameRow(
                id=f"{set_name}-{catalog.category}-{i:05d}",
                image=image,
                ret_paths=candidates,
                names=names,
                speaker_problem=speaker_problem,
                solution=names[label],
                label=label,
                category=catalog.category,
                concept=target.name,
            )
        )
    return rows


def _name(concept: Concept) -> str:
    return concept.name


def _views(concept: Concept, set_name: str) -> tuple[str, ...]:
    if set_name == "train" or concept.held_out:
        return concept.train_views
    return concept.new_views or concept.train_views
