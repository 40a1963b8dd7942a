"""Every config that ships, the page that documents the fields, and what reading a config costs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl import launch
from hpc_rl.config.environment import NAMES
from hpc_rl.config.identity import to_json
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.loader import RECIPES, config_class, from_json, load, load_with_places
from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.config.schema import Config
from tools import config_reference

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "configs").rglob("*.yaml")
    if path.parent.name != "cluster"
)
PROFILES = sorted(path.name for path in (REPOSITORY / "configs" / "cluster").glob("*.yaml"))


def test_there_are_configs() -> None:
    of_recipes = {f"configs/{folder}{name}.yaml" for name in RECIPES for folder in ("", "tiny/")}
    assert of_recipes <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads_from_the_root_of_the_repository(name: str) -> None:
    loaded = load_with_places(name, env={"HOME": "/home/u"}, cwd=REPOSITORY)
    assert loaded.notes == ()
    assert from_json(to_json(loaded.config)) == loaded.config


@pytest.mark.parametrize("target", ["demo", "demo-prosetting"])
def test_a_demo_is_the_same_beside_a_users_own_variables(target: str) -> None:
    """docs/recipes/prosetting.md has its reader write a `.env`; the demos promise nothing from outside."""
    mine = {
        "WORKSPACE_DIR": "/mine", "SOLVER_MODEL_PATH": "/m", "QUESTIONS_FILE": "/q.json", "TRL_NUM_PROCESSES": "8",
        "TEACHER_BASE_URL": "http://t", "TEACHER_MODEL": "t", "LISTENER_URL": "http://l",
        "AUTO_CONTINUE_ON_FAILURE": "true",
    }  # fmt: skip
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    _, _, typed = shown.replace("\\\n", " ").partition("-m hpc_rl.launch ")
    arguments = launch.parse(shlex.split(typed))
    alone, beside_mine = (load(arguments.config, arguments.set, env, cwd=REPOSITORY) for env in ({}, mine))
    assert alone == load(arguments.config, env={}, cwd=REPOSITORY)
    assert beside_mine == alone


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_cluster_profile_goes_with_the_recipes_config(profile: str, recipe: str, tmp_path: Path) -> None:
    configs = REPOSITORY / "configs"
    (tmp_path / "run.yaml").write_text(f"extends: [{configs}/{recipe}.yaml, {configs}/cluster/{profile}]\n")
    load("run.yaml", env={"HOME": "/home/u", "USER": "u"}, cwd=tmp_path)


def test_the_default_profile_is_what_the_schema_says(tmp_path: Path) -> None:
    small = "recipe: lewis\nrun: {name: a}\nspeaker: {path: a}\nlistener: {path: b}\ndata: {scenes: {}}\n"
    (tmp_path / "a.yaml").write_text(small)
    (tmp_path / "b.yaml").write_text(f"extends: {REPOSITORY}/configs/cluster/default.yaml\n{small}")
    assert load("a.yaml", env={}, cwd=tmp_path) == load("b.yaml", env={}, cwd=tmp_path)


def test_lewis_has_the_values_of_its_systems_page() -> None:
    config = load("configs/lewis.yaml", env={}, cwd=REPOSITORY)
    assert isinstance(config, LewisConfig)
    lora, train = config.speaker.lora, config.train
    assert lora is not None
    assert (lora.r, lora.alpha, lora.dropout, train.gradient_accumulation_steps) == (64, 128, 0.001, 16)  # L17
    assert (train.learning_rate, train.adam_betas, train.weight_decay) == (5e-7, (0.9, 0.95), 0.1)  # L18
    assert (train.warmup_steps, config.speaker.dtype) == (100, "bfloat16")  # L18
    assert train.deepspeed == REPOSITORY / "configs" / "deepspeed" / "zero3_offload.json"  # L18
    assert (config.speaker.max_pixels, config.listener.max_pixels) == (401408, 401408)  # L19
    assert (config.sample.samples_per_prompt, config.data.k) == (4, 3)  # L15, L20
    steps = config.sample.prompts_per_round * config.sample.samples_per_prompt // config.train_batch_size
    assert steps > train.warmup_steps, "a round would end before the learning rate is reached"


def test_prosetting_has_the_values_of_its_systems_page() -> None:
    config = load("configs/prosetting.yaml", env={}, cwd=REPOSITORY)
    assert isinstance(config, ProSettingConfig)
    client, enhance = config.services.teacher.client, config.enhance
    assert config.sample.samples_per_prompt == 8 and config.stages["collect"].tasks > 1  # S1
    assert (client.parallel_calls, enhance.teacher) == (32, "teacher") and client.url  # S2, S3
    assert config.questions.validation_fraction == 0.1 and config.pairs.reference_solutions  # S5
    assert (config.train_start_round, config.data_window) == (3, "all")  # S7
    assert config.pool.replay_fraction == 0.2  # S9
    assert (config.backend, config.grade.judge, config.grade.check_references) == ("dpo", "unsure", True)  # S10, S2, S4
    assert config.run.rounds > config.train_start_round


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_example_of_env_names_every_variable_and_its_field(recipe: str) -> None:
    text = (REPOSITORY / ".env.example").read_text()
    for name, field in (NAMES | config_class(recipe).variables).items():
        assert re.search(rf"^#?{name}=.*# .*\b{re.escape(field)}\b", text, re.MULTILINE), name
    used = re.findall(r"\$\{(\w+)", (REPOSITORY / "configs" / f"{recipe}.yaml").read_text())
    assert [name for name in used if name != "NAME" and not re.search(rf"^#?{name}=", text, re.MULTILINE)] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_example_of_env_is_a_valid_env(recipe: str, tmp_path: Path) -> None:
    text = (REPOSITORY / ".env.example").read_text()
    (tmp_path / ".env").write_text(re.sub(r"^#(?=[A-Z_]+=)", "", text, flags=re.MULTILINE))
    config = load(REPOSITORY / "configs" / f"{recipe}.yaml", env={}, cwd=tmp_path)
    assert config.services.listener.client.url == "http://gpu-node-01:9000"


def test_the_reference_page_is_current() -> None:
    assert config_reference.PAGE.read_text() == config_reference.page(), "run: python -m tools.config_reference"


def test_the_reference_page_has_every_field_of_every_recipe() -> None:
    page = config_reference.page()
    for name in RECIPES:
        part = page.partition(f"## Fields of `recipe: {name}`")[2].partition("\n## ")[0]
        for field in set(config_class(name).model_fields) - set(Config.model_fields):
            assert f"\n| `{field}` |" in part, (name, field)
    for cls in CLASSES:
        rows = "\n".join(f"| `{field}` |" for field in cls.model_fields)
        assert all(row in page for row in rows.split("\n")), cls


CLASSES = list(dict.fromkeys(cls for name in RECIPES for _, cls in config_reference.sections(config_class(name))))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_field_has_a_text(cls: type) -> None:
    docs = config_reference.field_docs(cls)
    assert set(docs) >= set(cls.model_fields)  # type: ignore[attr-defined]


HEAVY = ("torch", "transformers", "vllm", "numpy", "PIL", "submitit", "fastapi", "dotenv")
PROBE = f"""
import sys
from hpc_rl.config import load, from_json, to_json
config = load(sys.argv[1], env={{}})
from_json(to_json(config))
print(*(name for name in {HEAVY!r} if name in sys.modules))
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_reading_a_config_imports_nothing_heavy(recipe: str) -> None:
    command = [sys.executable, "-c", PROBE, f"configs/{recipe}.yaml"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert said.split() == []
