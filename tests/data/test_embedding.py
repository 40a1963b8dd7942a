"""Vision towers of both kinds embed pictures of any size and mode, and put look-alikes next to each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_rl.data import scenes
from hpc_rl.data.embedding import Embedder, embed_concepts, unit
from hpc_rl.data.games import nearest

SPEAKER = Path(__file__).resolve().parents[2] / "models" / "tiny-lewis" / "speaker"


@pytest.fixture(scope="module")
def tower() -> Embedder:
    return Embedder(str(SPEAKER), min_pixels=3136, max_pixels=12544)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    photo = scenes.render(7, "train", "ring", "red-striped", 0, 112)
    photo.save(folder / "scene.png")
    photo.resize((3000, 2000)).save(folder / "large.jpg")
    photo.convert("RGBA").save(folder / "rgba.png")
    photo.convert("L").save(folder / "grey.png")
    Image.new("RGB", (40, 200), "green").save(folder / "narrow.webp")
    exif = Image.Exif()
    exif[0x0112] = 8
    photo.transpose(Image.Transpose.ROTATE_270).save(folder / "turned.png", exif=exif)
    return folder


def test_pictures_of_any_kind_are_embedded_in_order(tower: Embedder, pictures: Path) -> None:
    paths = sorted(pictures.iterdir())
    together = tower.embed(paths, batch_size=4)
    assert together.shape == (6, 96)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([tower.embed([path]) for path in paths])
    np.testing.assert_allclose(together, alone, atol=1e-4)  # a picture's neighbours in the batch do not matter


def test_a_picture_stored_sideways_is_embedded_upright(tower: Embedder, pictures: Path) -> None:
    upright, turned = tower.embed([pictures / "scene.png", pictures / "turned.png"])
    np.testing.assert_allclose(upright, turned, atol=1e-5)


def test_pixel_limits_bound_the_work_on_a_large_picture(pictures: Path) -> None:
    small = Embedder(str(SPEAKER), min_pixels=3136, max_pixels=3136)
    inputs = small.inputs([pictures / "large.jpg"])
    assert inputs["pixel_values"].shape[0] <= 3136 // 14**2


def test_the_nearest_concepts_share_an_attribute(tower: Embedder, tmp_path: Path) -> None:
    scenes.render_category(tmp_path, 7, "disc", {"train": 6}, 56)
    views = {name: [f"train/disc/{name}/view_{i:03d}.png" for i in range(6)] for name in scenes.concepts()}
    embeddings = embed_concepts(tower, tmp_path, views)
    alike = [
        bool(set(name.split("-")) & set(other.split("-")))
        for name in views
        for other in nearest(embeddings, name, list(views), 2)
    ]
    by_chance = 9 / 23  # 2 of the same colour, 7 of the same pattern
    assert np.mean(alike) > 2 * by_chance


def test_a_concept_is_the_mean_of_its_views(tower: Embedder, tmp_path: Path) -> None:
    scenes.render_category(tmp_path, 7, "disc", {"train": 3}, 56)
    paths = [f"train/disc/blue-plain/view_{i:03d}.png" for i in range(3)]
    rows = tower.embed([tmp_path / path for path in paths])
    found = embed_concepts(tower, tmp_path, {"blue-plain": paths, "one": paths[:1]}, batch_size=2)
    np.testing.assert_allclose(found["blue-plain"], unit(rows.mean(0)), atol=1e-5)
    np.testing.assert_allclose(found["one"], rows[0], atol=1e-5)


def test_a_clip_model_embeds_too(pictures: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": 99},
        vision_config={**tiny, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    rows = Embedder(str(tmp_path), max_pixels=401408).embed(sorted(pictures.iterdir()))
    assert rows.shape == (6, 24)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_a_model_without_a_vision_tower_is_an_error(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    Qwen2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"qwen2.*data.embedding.path"):
        Embedder(str(tmp_path))
