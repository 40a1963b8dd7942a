"""What is found on the file system before anything is submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hpc_rl.config import check_images
from hpc_rl.config.check_storage import Mount, check_storage, mount_of
from hpc_rl.config.checks import check, check_deepspeed, check_model
from hpc_rl.config.errors import Problem
from tests.config.conftest import Load

REPOSITORY = Path(__file__).parents[2]


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for role in ("speaker", "listener"):
        folder = tmp_path / "models" / role
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
        (folder / "model.safetensors").write_bytes(b"")
    return tmp_path / "models"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for concept in ("mug", "cup", "jug"):
        folder = root / "train" / "vessels" / concept
        folder.mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((40, 30), 60).save(folder / f"{number}.jpg")
    return root


@pytest.fixture
def with_photos(small: Load, models: Path, photos: Path) -> Callable[..., list[Problem]]:
    def found(*overrides: str) -> list[Problem]:
        return check(small("data.scenes=null", f"data.image_root={photos}", "cluster.executor=local", *overrides))

    return found


def test_a_config_whose_inputs_are_there_has_no_problems(small: Load, models: Path) -> None:
    assert check(small("cluster.executor=local")) == []


def test_a_problem_says_who_set_the_field(small: Load, models: Path) -> None:
    (models / "speaker" / "config.json").unlink()
    problems = check(small("cluster.executor=local"), {"speaker.path": "small.yaml:3"})
    assert str(only(problems)).startswith("small.yaml:3: speaker.path: ")


# --- models


def test_missing_model_folders_are_named_all_at_once(small: Load) -> None:
    problems = check(small("cluster.executor=local", "data.embedding.path=clip"))
    assert [p.field for p in problems] == ["speaker.path", "listener.path", "data.embedding.path"]
    assert all("does not exist" in p.what and "hf download" in p.way_out for p in problems)


def test_the_listener_of_someone_else_needs_no_model_here(small: Load) -> None:
    fields = [p.field for p in check(small("cluster.executor=local", "services.listener.client.url=http://a:1"))]
    assert fields == ["speaker.path"]


@pytest.mark.parametrize("name", ["verifier", "reward_model", "teacher", "enhancer"])
def test_a_service_needs_the_model_that_it_is_to_serve_unless_it_runs_elsewhere(
    name: str, small: Load, models: Path
) -> None:
    missing = f"services.{name}.model={models / 'none'}"
    problem = only(check(small("cluster.executor=local", missing)))
    assert problem.field == f"services.{name}.model" and "does not exist" in problem.what
    assert check(small("cluster.executor=local", missing, f"services.{name}.client.url=http://a:1")) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
    ],
)
def test_a_folder_that_is_no_model(content: str | None, expected: str, models: Path) -> None:
    file = models / "speaker" / "config.json"
    file.unlink() if content is None else file.write_text(content)
    assert expected in only(list(check_model("speaker.path", models / "speaker"))).what


def test_pickled_weights_are_refused(models: Path) -> None:
    (models / "speaker" / "model.safetensors").rename(models / "speaker" / "pytorch_model.bin")
    assert "no *.safetensors" in only(list(check_model("speaker.path", models / "speaker"))).what


def test_a_model_that_is_a_file(models: Path) -> None:
    assert "is a file" in only(list(check_model("speaker.path", models / "speaker" / "config.json"))).what


# --- images


def test_a_good_image_folder_passes(with_photos: Callable[..., list[Problem]]) -> None:
    assert with_photos() == []


def test_a_missing_image_folder_is_named(with_photos: Callable[..., list[Problem]]) -> None:
    problem = only(with_photos("data.image_root=/no/such/folder"))
    assert problem.field == "data.image_root"
    assert "/no/such/folder does not exist" in problem.what


def test_images_in_the_wrong_layout(with_photos: Callable[..., list[Problem]], photos: Path) -> None:
    problem = only(with_photos(f"data.image_root={photos / 'train' / 'vessels'}"))
    assert "no categories" in problem.what
    assert "<split>/<category>/<concept>" in problem.expected


def test_too_few_concepts_for_a_game(with_photos: Callable[..., list[Problem]]) -> None:
    assert "needs at least 4" in only(with_photos("data.k=4")).what


def test_folders_without_pictures(with_photos: Callable[..., list[Problem]], photos: Path) -> None:
    for file in photos.glob("*/*/*/*"):
        file.rename(file.with_suffix(".txt"))
    assert "no pictures" in only(with_photos()).what


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_an_unreadable_image_is_named(
    damage: str, suffix: str, with_photos: Callable[..., list[Problem]], photos: Path
) -> None:
    bad = photos / "train" / "vessels" / "cup" / f"bad{suffix}"
    Image.effect_noise((200, 200), 60).save(bad)
    whole = bad.read_bytes()
    bad.write_bytes({"empty": b"", "text": b"not found", "cut": whole[: len(whole) * 2 // 3]}[damage])
    problem = only(with_photos())
    assert str(bad) in problem.what
    assert "data.unreadable_image=skip" in problem.way_out
    assert with_photos("data.unreadable_image=skip") == []


def test_a_whole_photo_with_something_behind_its_end_is_fine(
    with_photos: Callable[..., list[Problem]], photos: Path
) -> None:
    file = photos / "train" / "vessels" / "cup" / "0.jpg"
    file.write_bytes(file.read_bytes() + b"video of the moment before")
    assert with_photos() == []


def test_of_many_pictures_some_of_every_concept_are_looked_at(
    with_photos: Callable[..., list[Problem]], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_images, "LOOK_AT", 3)
    for concept in ("mug", "cup", "jug"):
        (photos / "train" / "vessels" / concept / "0.jpg").write_bytes(b"")
        (photos / "train" / "vessels" / concept / "2.jpg").write_bytes(b"")
    problem = only(with_photos())
    assert problem.what.count("0.jpg") == 3 and "2.jpg" not in problem.what
    assert "looked at 3 of 9 pictures" in problem.what


# --- DeepSpeed


@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_the_shipped_deepspeed_files_pass(name: str) -> None:
    assert list(check_deepspeed(REPOSITORY / "configs" / "deepspeed" / f"{name}.json", "bfloat16")) == []


def test_numbers_that_the_config_has_are_refused_in_the_deepspeed_file(tmp_path: Path) -> None:
    seed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-7, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 5e-7, "warmup_num_steps": 100}},
        "zero_optimization": {"stage": 3},
    }
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(seed))
    text = "\n".join(map(str, check_deepspeed(file, "bfloat16")))
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer.params.lr"):
        assert f"sets {key} to" in text
    assert 'write "auto" there, and the value to train.learning_rate' in text


def test_a_deepspeed_file_of_another_number_type_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 4}}')
    problems = list(check_deepspeed(file, "float32"))
    assert "speaker.dtype is float32" in problems[0].what
    assert problems[1].expected == "0, 1, 2 or 3"


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "does not exist"), ("{,}", "cannot be read"), ("3", "no JSON")]
)
def test_a_bad_deepspeed_file(content: str | None, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    assert expected in only(list(check_deepspeed(file, "bfloat16"))).what


# --- storage


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    file = tmp_path / "mounts"
    file.write_text(
        "overlay / overlay rw 0 0\n"
        "server:/home /home nfs4 rw 0 0\n"
        "/dev/sda1 /data ext4 rw 0 0\n"
        "tmpfs /data/fast tmpfs rw 0 0\n"
        "server:/odd /mnt/a\\040b nfs4 rw 0 0\n"
        "/dev/sdb1 /tmp xfs rw 0 0\n"
        "server:/t /tmp/shared nfs4 rw 0 0\n"
    )
    return file


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/u/run", Mount(Path("/home"), "nfs4")),
        ("/homes/run", Mount(Path("/"), "overlay")),
        ("/data/fast/run", Mount(Path("/data/fast"), "tmpfs")),
        ("/mnt/a b/run", Mount(Path("/mnt/a b"), "nfs4")),
    ],
)
def test_the_mount_of_a_path(path: str, expected: Mount, mounts: Path) -> None:
    assert mount_of(Path(path), mounts) == expected


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/home/u/run", None),
        ("/data/run", None),
        ("/mnt/a b/run", None),
        ("/tmp/shared/run", None),
        ("/data/fast/run", "tmpfs"),
        ("/anywhere/run", "overlay"),
        ("/tmp/run", "/tmp belongs to each node"),
    ],
)
def test_a_workspace_that_other_nodes_do_not_see(path: str, reason: str | None, small: Load, mounts: Path) -> None:
    problems = [p for p in check_storage(small(f"run.workspace={path}"), "slurm", mounts) if "other nodes" in p.what]
    if reason is None:
        assert problems == []
    else:
        assert reason in only(problems).what
        assert "cluster.allow_local_workspace" in problems[0].way_out


def test_on_one_machine_any_workspace_will_do(small: Load, mounts: Path) -> None:
    config = small("run.workspace=/tmp/run", "cluster.allow_local_workspace=true")
    assert list(check_storage(config, "slurm", mounts)) == []
    assert list(check_storage(small("run.workspace=/tmp/run"), "local", mounts)) == []


def test_a_named_shared_root_is_believed_and_required(small: Load, mounts: Path, tmp_path: Path) -> None:
    inside = small(f"cluster.shared_roots=[{tmp_path}]", f"run.workspace={tmp_path}/deep/run")
    outside = small(f"cluster.shared_roots=[{tmp_path}/a]", f"run.workspace={tmp_path}/b")
    assert list(check_storage(inside, "slurm", mounts)) == []
    assert "not on shared storage" in only(list(check_storage(outside, "slurm", mounts))).what


def test_a_link_does_not_hide_where_a_workspace_lies(small: Load, mounts: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "local")
    config = small(f"cluster.shared_roots=[{tmp_path}/shared]", f"run.workspace={tmp_path}/shared/link/run")
    assert "not on shared storage" in only(list(check_storage(config, "slurm", mounts))).what


def test_a_workspace_beneath_a_file(small: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in only(list(check_storage(small("run.workspace=file/run"), "local"))).what


def test_a_workspace_that_is_not_writable(small: Load) -> None:
    problem = only(list(check_storage(small("run.workspace=/proc/self/run"), "local")))
    assert "cannot write to /proc/self" in problem.what


def test_checking_leaves_nothing_behind(small: Load, models: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    check(small("cluster.executor=local"))
    assert sorted(tmp_path.rglob("*")) == before
