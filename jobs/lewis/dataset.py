"""Merge the categories' games into the run's data sets: train, new views, validation."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data.image_folder import ImageFolderError
from hpc_rl.data.lewis import SETS, image_root, merge_rows, read_rows, write_rows
from hpc_rl.data.preparation import rows_wanted
from hpc_rl.orchestrate.job import open_job
from hpc_rl.orchestrate.placing import commit_placed
from hpc_rl.run import atomic

log = logging.getLogger("hpc_rl")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.lewis.dataset --workspace W --round 0`"""
    job = open_job("dataset", argv)
    assert isinstance(job.config, LewisConfig)
    data = job.config.data
    wanted = rows_wanted(data)
    for shard in job.shards():
        prepared = job.inputs(job.round, "prepare")
        written = {name: shard.output(name) for name in (*(f"{name}.parquet" for name in SETS), "dataset_info.json")}
        info = {
            "image_root": str(image_root(job.ws, data.image_root)),
            "k": data.k,
            "split_seed": data.split_seed,
            "negatives_from": data.negatives_from,
            "categories": [manifest.made_from["category"] for manifest in prepared],
            "embedding": prepared[0].made_from["embedding"],
            "unreadable_pictures": sum(manifest.metrics["unreadable_pictures"] for manifest in prepared),
            "sets": {},
        }
        metrics = {}
        for name in SETS:
            rows = merge_rows([read_rows(manifest.path(f"{name}.parquet")) for manifest in prepared], data.split_seed)
            if not rows:
                raise ImageFolderError(
                    f"no category has a concept for the {name} games: data.k={data.k} and "
                    f"data.validation_fraction={data.validation_fraction} hold none out. Add concepts, or raise it."
                )
            if len(rows) < wanted[name]:  # categories too small to hold a concept out give no validation games
                log.warning("%s: %d games instead of %d", name, len(rows), wanted[name])
            write_rows(written[f"{name}.parquet"], rows)
            info["sets"][name] = {
                "rows": len(rows),
                "concepts": dict(sorted(Counter(f"{row.category}/{row.concept}" for row in rows).items())),
            }
            metrics[f"rows_{name}"] = len(rows)
            metrics[f"concepts_{name}"] = len(info["sets"][name]["concepts"])
        atomic.write_json(written["dataset_info.json"], info)
        placed = {path: job.ws.dataset_dir(job.round) / name for name, path in written.items()}
        commit_placed(shard, placed, made_from={"split_seed": data.split_seed}, metrics=metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
