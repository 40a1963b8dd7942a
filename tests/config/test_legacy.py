"""What users of the seed bring along: its `.env` and the keys of its `training_config.json` (S13)."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.config import legacy
from hpc_rl.config.errors import ConfigError
from hpc_rl.config.loader import Loaded, load_with_places
from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.config.walk import field_at

SEED: dict[str, Any] = {
    "max_rounds": 5,
    "save_rounds": [3, 4, 5],
    "attempts_per_question": 4,
    "physical_solver_gpu": "4",
    "physical_grpo_gpu": "0,1,2,3,4,5,6,7",
    "training_framework": "VERL_PPO",
    "trl_num_processes": 8,
    "trl_mixed_precision": "fp16",
}
"""The seed's own, with other values where its are our defaults."""
PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "prosetting.md"
MINE = "recipe: prosetting\nrun: {name: a}\nsolver: {path: m}\nquestions: {file: q.json}\n"


def load(folder: Path, keys: dict[str, Any], mine: str = MINE, env: dict[str, str] | None = None) -> Loaded:
    """A file of the seed with a file of ours over it."""
    (folder / "training_config.json").write_text(json.dumps(keys, indent="\t"))
    (folder / "run.yaml").write_text(f"extends: training_config.json\n{mine}")
    return load_with_places("run.yaml", env=env or {}, cwd=folder)


def value(loaded: Loaded, field: str) -> object:
    found: Any = loaded.config
    for part in field.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that places are short


def test_the_file_of_the_seed_sets_our_fields(tmp_path: Path) -> None:
    """S13, S8 (`save_rounds`), S10 (VERL PPO)."""
    loaded = load(tmp_path, SEED)
    assert {field: value(loaded, field) for key in SEED for field in legacy.PROSETTING[key].fields} == {
        "run.rounds": 5,
        "sample.samples_per_prompt": 4,
        "stages.collect.tasks": 1,
        "stages.collect.gpus_per_node": 1,
        "stages.train.gpus_per_node": 8,
        "stages.train.ranks_per_node": 8,
        "backend": "rloo",
        "solver.dtype": "float16",
    }
    assert loaded.places["run.rounds"] == "training_config.json:2"


def test_each_of_its_keys_is_noted_with_its_line_and_field(tmp_path: Path) -> None:
    notes = load(tmp_path, SEED).translated
    assert notes[:2] == (
        "training_config.json:2: max_rounds is run.rounds = 5",
        "training_config.json:3: save_rounds sets nothing here: every trained round is kept",
    )
    assert [re.sub(r".*:\d+: (\w+) .*", r"\1", note) for note in notes] == list(SEED)


def test_a_key_in_the_env_file_is_said_to_be_read_by_nobody(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TEACHER_API_KEY=sk-of-the-tests\nTEACHER_BASE_URL=http://t/v1\n")
    (note,) = load(tmp_path, {}).notes
    assert note.startswith(".env (TEACHER_API_KEY) changes nothing") and "api_key_file" in note
    assert "sk-of-the-tests" not in note
    assert load(tmp_path, {}, env={"TEACHER_API_KEY": "sk-of-the-tests"}).notes == ()
    elsewhere = "services: {teacher: {client: {api_key_file: key}}}\n"
    assert load(tmp_path, {}, MINE + elsewhere).notes == ()


@pytest.mark.parametrize("key", sorted(legacy.PROSETTING))
def test_every_key_leads_to_fields_and_is_none_itself(key: str) -> None:
    assert key not in ProSettingConfig.model_fields
    for field in legacy.PROSETTING[key].fields:
        assert field_at(ProSettingConfig, tuple(field.split("."))) is not None, field


@pytest.mark.parametrize(
    ("key", "given", "field", "expected"),
    [
        ("training_framework", "TRL_DPO", "backend", "dpo"),
        ("trl_mixed_precision", "no", "solver.dtype", "float32"),
        ("trl_mixed_precision", "bf16", "solver.dtype", "bfloat16"),
        ("physical_solver_gpu", "0,1, 2", "stages.collect.tasks", 3),
        ("physical_solver_gpu", 4, "stages.collect.tasks", 1),
        ("physical_solver_gpu", [4, 5], "stages.collect.gpus_per_node", 1),
        ("replay_frac", 0.5, "pool.replay_fraction", 0.5),
        ("auto_retry_enabled", False, "run.auto_retry", False),
        ("auto_continue_on_failure", True, "run.continue_on_failure", True),
        ("questions_file", "/q/a.json", "questions.file", Path("/q/a.json")),
        ("solver_model_path", "/m/qwen", "solver.path", "/m/qwen"),
        ("workspace_dir", "/w/run", "run.workspace", Path("/w/run")),
        ("teacher_base_url", "http://t:8000/v1", "services.teacher.client.url", "http://t:8000/v1"),
    ],
)
def test_a_value_of_the_seed_is_ours(tmp_path: Path, key: str, given: object, field: str, expected: object) -> None:
    mine = "recipe: prosetting\nrun: {name: a}\nsolver: {}\nquestions: {}\n"
    paths = {"questions_file": "/q/b.json", "solver_model_path": "/m/b"}
    assert value(load(tmp_path, {**paths, key: given}, mine), field) == expected


def test_a_later_file_wins_in_either_spelling(tmp_path: Path) -> None:
    assert value(load(tmp_path, SEED, f"{MINE}sample: {{samples_per_prompt: 2}}\n"), "sample.samples_per_prompt") == 2
    assert value(load(tmp_path, SEED, f"{MINE}attempts_per_question: 8\n"), "sample.samples_per_prompt") == 8


def test_the_environment_wins_over_the_file_of_the_seed(tmp_path: Path) -> None:
    env = {"TRL_NUM_PROCESSES": "2", "QUESTIONS_FILE": "other.json"}
    loaded = load(tmp_path, SEED, env=env)
    assert value(loaded, "stages.train.ranks_per_node") == 2
    assert value(loaded, "questions.file") == tmp_path / "other.json"


def test_both_spellings_in_one_file_with_one_value_are_no_problem(tmp_path: Path) -> None:
    assert value(load(tmp_path, {"max_rounds": 4, "run": {"rounds": 4}}), "run.rounds") == 4


@pytest.mark.parametrize(
    ("mine", "settings", "env", "winner"),
    [
        (f"{MINE.replace('name: a', 'name: a, rounds: 7')}", [], {}, "run.yaml:3"),
        (f"{MINE}max_rounds: 7\n", [], {}, "run.yaml:6"),
        (MINE, ["run.rounds=7"], {}, "--set"),
        (f"{MINE}trl_num_processes: 2\n", [], {"TRL_NUM_PROCESSES": "2"}, "environment variable TRL_NUM_PROCESSES"),
    ],
)
def test_a_key_of_the_seed_that_did_not_win_says_who_did(
    tmp_path: Path, mine: str, settings: list[str], env: dict[str, str], winner: str
) -> None:
    load(tmp_path, SEED, mine)
    loaded = load_with_places("run.yaml", settings, env=env, cwd=tmp_path)
    overridden = [line for line in loaded.translated if "overridden by" in line]
    assert overridden[0].endswith(f"(overridden by {winner})")
    # each line is true of the config, or names another line
    for line in loaded.translated:
        for field, said in re.findall(r"(\S+) = (\S+)(?=[,;]|$)", line):
            assert str(value(loaded, field)) == said, line


def problems(folder: Path, keys: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, keys)
    return str(caught.value)


def test_both_spellings_in_one_file_with_two_values_are_a_problem_with_both_places(tmp_path: Path) -> None:
    said = problems(tmp_path, {"max_rounds": 4, "run": {"rounds": 5}})
    assert "training_config.json:4: run.rounds: 5, but max_rounds says 4 (training_config.json:2)" in said


@pytest.mark.parametrize("teacher", [None, {"client": None}, {"client": {"url": None}}])
def test_null_in_our_spelling_is_a_value_as_well(tmp_path: Path, teacher: object) -> None:
    said = problems(tmp_path, {"teacher_base_url": "http://t", "services": {"teacher": teacher}})
    assert "services.teacher.client.url: null, but teacher_base_url says 'http://t' (training_config.json:2)" in said


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("training_framework", "TRL_PPO", "expected: TRL_DPO | VERL_PPO"),
        ("physical_solver_gpu", "4,4", "expected: each GPU once"),
        ("physical_grpo_gpu", "0-7", "expected: numbers of GPUs"),
        ("physical_grpo_gpu", True, "expected: numbers of GPUs"),
        ("trl_mixed_precision", "int8", "expected: bf16 | fp16 | no"),
        ("max_rounds", "five", 'run.rounds: "five"\n      expected: int ≥ 1'),
        ("max_round", 5, "max_round: unknown key"),
    ],
)
def test_what_cannot_be_read_is_a_problem_with_its_line(tmp_path: Path, key: str, given: object, expected: str) -> None:
    said = problems(tmp_path, {key: given})
    assert "training_config.json:2: " in said
    assert expected in said


def test_its_keys_are_for_files_and_set_is_told_ours(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINE)
    with pytest.raises(ConfigError, match=r"--set: max_rounds: unknown key\n.*\n.*here it is run\.rounds"):
        load_with_places("run.yaml", ["max_rounds=3"], env={}, cwd=tmp_path)


def test_its_keys_in_another_recipe_name_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "training_config.json").write_text(json.dumps(SEED))
    with pytest.raises(ConfigError, match=r"max_rounds: unknown key\n.*\n.*recipe: prosetting knows this key"):
        load_with_places("training_config.json", env={}, cwd=tmp_path)


def test_the_page_of_the_recipe_maps_every_key_and_variable_to_its_fields() -> None:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    keys = {cells[1].split("`")[1]: cells[3] for cells in rows if len(cells) == 5 and "`" in cells[1]}
    for key, known in legacy.PROSETTING.items():
        assert all(f"`{field}`" in keys[key] for field in known.fields), key
        assert known.fields or "nothing to set" in keys[key]
    for name, field in ProSettingConfig.variables.items():
        assert [cells for cells in rows if len(cells) == 5 and name in cells[2] and f"`{field}`" in cells[3]], name


ENV = (
    "SOLVER_MODEL_PATH=/path/to/solver/model\nQUESTIONS_FILE=/path/to/questions.json\n"
    "WORKSPACE_DIR=/path/to/workspace\nTRL_NUM_PROCESSES=8\nTEACHER_BASE_URL=http://your-teacher-api\n"
    "AUTO_RETRY_ENABLED=true          # Enable automatic retry\n"
    "AUTO_CONTINUE_ON_FAILURE=true   # Whether to continue next round on failure\n"
    "CHECKPOINT_INTERVAL=1            # Checkpoint save interval\n"
)


def test_the_env_file_of_the_seed_is_taken_as_it_is(tmp_path: Path) -> None:
    """S13: its README's `.env`."""
    (tmp_path / ".env").write_text(ENV)
    loaded = load(tmp_path, {}, MINE.replace("name: a", "name: a, auto_retry: false"))
    found = {place: field for field, place in loaded.places.items() if place.startswith(".env")}
    assert {place: value(loaded, field) for place, field in found.items()} == {
        ".env (SOLVER_MODEL_PATH)": "/path/to/solver/model",
        ".env (QUESTIONS_FILE)": Path("/path/to/questions.json"),
        ".env (WORKSPACE_DIR)": Path("/path/to/workspace"),
        ".env (TRL_NUM_PROCESSES)": 8,
        ".env (TEACHER_BASE_URL)": "http://your-teacher-api",
        ".env (AUTO_RETRY_ENABLED)": True,
        ".env (AUTO_CONTINUE_ON_FAILURE)": True,
    }
    (note,) = loaded.translated
    assert note.startswith(".env (CHECKPOINT_INTERVAL) sets nothing here: each stage of each round can be resumed")


@pytest.mark.parametrize("keys", [{}, SEED | {"training_framework": "TRL_DPO"}, SEED, {"trl_num_processes": 8}])
def test_the_shipped_config_goes_with_the_files_of_the_seed(tmp_path: Path, keys: dict[str, Any]) -> None:
    """S13: `configs/prosetting.yaml` with its `.env`, with and without its `training_config.json`."""
    (tmp_path / ".env").write_text(ENV)
    (tmp_path / "training_config.json").write_text(json.dumps(keys))
    (tmp_path / "run.yaml").write_text(
        f"extends: [{PAGE.parents[2]}/configs/prosetting.yaml, training_config.json]\nrun: {{name: mine}}\n"
    )
    loaded = load_with_places("run.yaml", env={}, cwd=tmp_path)
    train = loaded.config.stages["train"]
    assert (train.ranks, train.gpus_per_node, train.nodes) == (8, 8, 1)
    assert isinstance(loaded.config, ProSettingConfig)
    dpo = loaded.config.dpo
    assert dpo.per_device_batch_size * dpo.gradient_accumulation_steps * train.world_size == 64


def test_the_example_of_the_page_has_a_workspace_of_its_own_and_finds_its_files(tmp_path: Path) -> None:
    """S13: as the page has it, launched from the repository's folder."""
    (example,) = re.findall(r"((?:^    .*\n)+)", PAGE.read_text().partition("work as they are:\n\n")[2], re.M)[:1]
    (tmp_path / "training_config.json").write_text(json.dumps(SEED | {"training_framework": "TRL_DPO"}))
    text = textwrap.dedent(example).replace("configs/", f"{PAGE.parents[2]}/configs/").replace("/path/to/", "")
    (tmp_path / "my-run.yaml").write_text(text)
    config = load_with_places(tmp_path / "my-run.yaml", env={}, cwd=PAGE.parents[2]).config
    assert isinstance(config, ProSettingConfig)
    assert (config.run.name, config.run.workspace) == ("my-run", PAGE.parents[2] / "runs" / "my-run")
    assert config.dpo.deepspeed and config.dpo.deepspeed.is_file()
