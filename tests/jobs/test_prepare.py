"""The preparation of a run: rendered scenes or real photos become the same data sets, wherever the shards ran."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hpc_rl import config as configs
from hpc_rl.data import scenes
from hpc_rl.data.lewis import SETS, GameRow, merge_rows, read_rows
from hpc_rl.orchestrate.start import open_run
from hpc_rl.recipes import lewis
from hpc_rl.run import manifest
from hpc_rl.run.atomic import read_json
from hpc_rl.run.shard_leases import leases_of
from hpc_rl.run.workspace import Workspace
from jobs.lewis import dataset, prepare

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = (
    "data.scenes.views_train=3",
    "data.scenes.views_test=2",
    "data.train_rows=101",
    "data.eval_rows.new_views=30",
    "data.eval_rows.validation=41",
)


def new_run(root: Path, *settings: str) -> Workspace:
    """A workspace with a config, as `launch --init` leaves it."""
    file = REPOSITORY / "configs/tiny/lewis.yaml"
    loaded = configs.load(file, [*SETTINGS, *settings], {}, root, cwd=REPOSITORY)
    assert isinstance(loaded, lewis.LewisConfig)
    open_run(lewis.resolve(loaded), file)
    return Workspace(root)


def run(ws: Workspace) -> dict[str, tuple[GameRow, ...]]:
    arguments = ["--workspace", str(ws.root), "--round", "0"]
    assert prepare.main(arguments) == 0
    assert dataset.main(arguments) == 0
    return {name: tuple(read_rows(ws.dataset_dir(0) / f"{name}.parquet")) for name in SETS}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, tuple[GameRow, ...]]]:
    ws = new_run(tmp_path_factory.mktemp("run"))
    return ws, run(ws)


def test_a_late_claim_leaves_committed_data_sets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = new_run(tmp_path / "run")
    arguments = ["--workspace", str(ws.root), "--round", "0"]
    assert prepare.main(arguments) == 0
    merge = merge_rows

    def merge_late(*given: Any) -> tuple[GameRow, ...]:
        monkeypatch.setattr(dataset, "merge_rows", merge)
        (held,) = leases_of(ws.stage_dir(0, "dataset")).glob("*.lease.*")
        os.utime(held, (0, 0))  # no heartbeat for long: it is taken for dead
        assert dataset.main(arguments) == 0
        return tuple(reversed(merge(*given)))

    monkeypatch.setattr(dataset, "merge_rows", merge_late)
    assert dataset.main(arguments) == 0
    done = manifest.read(ws, 0, "dataset", 0)
    assert {done.path(f"{name}.parquet").name for name in SETS} == {f"{name}.parquet" for name in SETS}
    assert not [path.name for path in ws.stage_dir(0, "dataset").iterdir() if path.name.endswith(".parquet")]


def test_the_data_sets_are_what_the_config_asked_for(
    rendered: tuple[Workspace, dict[str, tuple[GameRow, ...]]],
) -> None:
    ws, sets = rendered
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 101, "new_views": 30, "validation": 41}
    info = read_json(ws.dataset_dir(0) / "dataset_info.json")
    assert info["categories"] == scenes.categories()
    assert info["sets"]["validation"]["rows"] == 41
    trained = {(row.category, row.concept) for row in sets["train"] + sets["new_views"]}
    held_out = {(row.category, row.concept) for row in sets["validation"]}
    assert not trained & held_out
    assert len(held_out) == 20
    for name, rows in sets.items():
        assert max(Counter(row.category for row in rows).values()) - len(rows) // 4 <= 1
        for row in rows:
            assert row.id.startswith(name)
            assert all((ws.images_dir / path).is_file() for path in (row.image, *row.ret_paths))


def test_the_manifest_names_the_data_sets(rendered: tuple[Workspace, dict[str, tuple[GameRow, ...]]]) -> None:
    ws, _ = rendered
    done = manifest.read(ws, 0, "dataset", 0)
    for name in SETS:
        assert done.path(f"{name}.parquet") == ws.dataset_dir(0) / f"{name}.parquet"
    assert done.metrics["concepts_validation"] == 20
    assert done.metrics["rows_train"] == 101


def test_another_workspace_gets_the_same_data_from_shards_in_any_order(
    rendered: tuple[Workspace, dict[str, tuple[GameRow, ...]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, sets = rendered
    shuffler = random.Random(3)
    monkeypatch.setattr("os.urandom", shuffler.randbytes)  # decides with which shard a task begins
    second = new_run(tmp_path, "run.seed=5")  # the run's seed is not the data's
    assert run(second) == sets

    def digests(root: Path) -> dict[str, str]:
        return {
            str(path.relative_to(root)): hashlib.sha256(Image.open(path).tobytes()).hexdigest()
            for path in root.rglob("*.png")
        }

    assert digests(second.images_dir) == digests(first.images_dir)


def photos(root: Path, *, test_split: bool) -> Path:
    """Photos as people have them: JPEG of all sizes, some rotated, grey or with transparency, in two categories."""
    for category, concepts in (("mug", 5), ("shoe", 4)):
        for concept in range(concepts):
            for split, views in (("train", 5), ("test", 2 if test_split else 0)):
                folder = root / split / category / f"{category} no. {concept}"
                if views:
                    folder.mkdir(parents=True)
                for view in range(views):
                    colour = (60 * concept, 20 * view, 90)
                    size = (3000, 2000) if (concept, view) == (0, 0) else (120 + 40 * view, 90)
                    picture = Image.new("RGB", size, colour)
                    exif = Image.Exif()
                    exif[0x0112] = 1 + (view * 5) % 8
                    if view == 3:
                        picture.convert("RGBA").save(folder / f"{view}.png")
                    elif view == 4:
                        picture.convert("L").save(folder / f"{view}.jpeg")
                    else:
                        picture.save(folder / f"{view}.JPG", exif=exif)
    return root


@pytest.mark.parametrize("test_split", [True, False])
def test_real_photos_go_the_same_way(tmp_path: Path, test_split: bool) -> None:
    root = photos(tmp_path / "photos", test_split=test_split)
    ws = new_run(tmp_path / "run", "data.scenes=null", f"data.image_root={root}", "data.negatives_from=null")
    sets = run(ws)
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 101, "new_views": 30, "validation": 41}
    trained_on = {path for row in sets["train"] for path in (row.image, *row.ret_paths)}
    for row in sets["new_views"]:
        assert row.image not in trained_on
        assert row.image.startswith("test/" if test_split else "train/")
    assert {(row.category, row.concept) for row in sets["validation"]}.isdisjoint(
        (row.category, row.concept) for row in sets["train"]
    )
    assert all((root / path).is_file() for rows in sets.values() for row in rows for path in row.ret_paths)


def test_an_unreadable_photo_stops_the_shard_or_is_counted(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", test_split=True)
    broken = root / "train/shoe/shoe no. 1/2.JPG"
    broken.write_bytes(broken.read_bytes()[:200])
    settings = ["data.scenes=null", f"data.image_root={root}", "data.negatives_from=null"]
    with pytest.raises(ValueError, match=r"shoe no\. 1/2\.JPG"):
        run(new_run(tmp_path / "stops", *settings))
    ws = new_run(tmp_path / "skips", *settings, "data.unreadable_image=skip")
    sets = run(ws)
    assert all(str(broken.relative_to(root)) not in row.ret_paths for rows in sets.values() for row in rows)
    assert read_json(ws.dataset_dir(0) / "dataset_info.json")["unreadable_pictures"] == 1


def test_a_category_that_is_too_small_says_so(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", test_split=True)
    settings = ["data.scenes=null", f"data.image_root={root}", "data.k=5", "data.negatives_from=null"]
    with pytest.raises(ValueError, match=r"category 'shoe' has 4 concept.*data\.k=5"):
        run(new_run(tmp_path / "run", *settings))
