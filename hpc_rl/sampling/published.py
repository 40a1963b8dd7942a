"""What the manifests of a stage's sampled shards say together: samples, tokens, tries and who made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.manifest import Manifest
from hpc_rl.sampling.tally import Tally

COUNTS = ("prompts", "dropped", "samples", "tokens", "cut_off")
"""What adds up over the manifests' metrics."""


@dataclass(frozen=True)
class Published:
    """What the manifests of a stage say together.

    Attributes
    ----------
    shards, prompts, dropped
        Published; prompts in them; prompts that were left out because they are too long.
    samples, tokens, cut_off
        Attempts, their tokens, and those that reached the longest length.
    tally
        Tries, accepted attempts and exhausted tasks by role.
    kept
        Tokens by the task that published them.
    """

    shards: int = 0
    prompts: int = 0
    dropped: int = 0
    samples: int = 0
    tokens: int = 0
    cut_off: int = 0
    tally: Tally = field(default_factory=Tally)
    kept: Mapping[str, int] = field(default_factory=dict)

    @property
    def accepted(self) -> int:
        """Samples that count, of all roles."""
        return sum(self.tally.accepted.values())


def published(manifests: Iterable[Manifest]) -> Published:
    """Add manifests of sampled shards up, one after the other.

    Raises
    ------
    CorruptFile
        When one lacks a number that sampling jobs write.
    """
    sums: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    tally = Tally()
    for manifest in manifests:
        metrics = manifest.metrics
        try:
            sums.update({"shards": 1, **{name: metrics[name] for name in COUNTS}})
            kept[metrics["task"]] += metrics["tokens"]
            tally += Tally.from_plain(metrics["by_role"])
        except KeyError as error:
            where = f"round {manifest.round} {manifest.stage} shard {manifest.shard}"
            raise CorruptFile(
                f"the manifest of {where} has no metrics.{error.args[0]}: no sampling job wrote it"
            ) from error
    return Published(**sums, tally=tally, kept=kept)
