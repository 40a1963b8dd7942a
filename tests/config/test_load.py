"""Who sets a field, and what becomes of paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_rl.config.environment import NAMES
from hpc_rl.config.errors import ConfigError
from hpc_rl.config.identity import to_json
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.loader import from_json, load, load_with_places
from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.config.schema import Config
from tests.config.conftest import MINIMAL, Load

LAYERS = ("extended", "file", ".env", "environment", "--set")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=32, deadline=None)
@given(layers=st.sets(st.sampled_from(LAYERS), min_size=1))
def test_the_last_layer_that_sets_a_field_wins_and_is_named(layers: set[str], tmp_path: Path) -> None:
    value = {layer: 10 + number for number, layer in enumerate(LAYERS)}

    def yaml_if(layer: str) -> str:
        return f"services: {{listener: {{batch_size: {value[layer]}}}}}\n" if layer in layers else ""

    (tmp_path / "site.yaml").write_text(yaml_if("extended"))
    (tmp_path / "run.yaml").write_text(f"extends: site.yaml\n{MINIMAL}{yaml_if('file')}")
    (tmp_path / ".env").write_text(f"LISTENER_BATCH_SIZE={value['.env']}\n" if ".env" in layers else "")
    env = {"LISTENER_BATCH_SIZE": str(value["environment"])} if "environment" in layers else {}
    overrides = [f"services.listener.batch_size={value['--set']}"] if "--set" in layers else []

    loaded = load_with_places("run.yaml", overrides, env, cwd=tmp_path)

    winner = [layer for layer in LAYERS if layer in layers][-1]
    place = {"extended": "site.yaml:1", "file": "run.yaml:7"}.get(winner, winner)
    assert isinstance(loaded.config, LewisConfig)
    assert loaded.config.services.listener.batch_size == value[winner]
    assert place in loaded.places["services.listener.batch_size"]


ODD_VALUES = {
    "services.listener.client.url": ("http://node-01:9000/batch_score", "http://node-01:9000"),
    "services.teacher.client.url": ("https://a.example/v1/chat/completions", "https://a.example/v1"),
    "services.teacher.client.model": ("judge-8b", "judge-8b"),
    "logging.debug": ("true", True),
    "logging.wandb.mode": ("online", "online"),
    "logging.wandb.project": ("GRPO_Lewis_Qwen_2VL", "GRPO_Lewis_Qwen_2VL"),
    "logging.wandb.dir": ("/w/wandb", "/w/wandb"),
    "logging.prediction_log": ("/w/log.jsonl", "/w/log.jsonl"),
    "run.workspace": ("/w/run", "/w/run"),
    "run.auto_retry": ("false", False),
    "run.continue_on_failure": ("true", True),
    "solver.path": ("/m/qwen", "/m/qwen"),
    "questions.file": ("/q/a.json", "/q/a.json"),
}
PROSETTING = """\
recipe: prosetting
run: {name: small}
solver: {path: models/solver, lora: {}}
questions: {file: questions.json}
stages: {train: {gpus_per_node: 7}}
"""
LEWIS = MINIMAL.replace("models/speaker}", "models/speaker, lora: {}}")


@pytest.mark.parametrize(
    ("yaml", "name", "field"),
    [
        *((LEWIS, name, field) for name, field in (NAMES | LewisConfig.variables).items()),
        *((PROSETTING, name, field) for name, field in (NAMES | ProSettingConfig.variables).items()),
    ],
)
def test_every_name_of_the_seeds_sets_its_field(yaml: str, name: str, field: str, tmp_path: Path) -> None:
    """S13, L4, L12."""
    (tmp_path / "run.yaml").write_text(yaml)
    text, expected = ODD_VALUES.get(field, ("7", 7))
    found: Any = load("run.yaml", env={name: text}, cwd=tmp_path)
    for part in field.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert (str(found) if isinstance(found, Path) else found) == expected


def test_a_variable_of_another_recipe_sets_nothing(small: Load) -> None:
    assert small(env={"TRL_NUM_PROCESSES": "8", "QUESTIONS_FILE": "q.json"}) == small()


def test_an_empty_variable_counts_as_not_set(small: Load) -> None:
    assert small(env={"LISTENER_URL": "", "LISTENER_BATCH_SIZE": ""}) == small()


def test_a_variable_does_not_switch_lora_on(minimal: Path, tmp_path: Path) -> None:
    loaded = load_with_places(minimal, env={"LORA_RANK": "8"}, cwd=tmp_path)
    assert isinstance(loaded.config, LewisConfig)
    assert loaded.config.speaker.lora is None
    assert loaded.notes == ("environment variable LORA_RANK changes nothing: speaker.lora is null in this config",)


def test_what_no_file_set_is_listed(minimal: Path, tmp_path: Path) -> None:
    loaded = load_with_places(minimal, ["run.seed=4"], {"DEBUG_MODE": "1"}, "elsewhere", cwd=tmp_path)
    assert loaded.overridden()["run.seed"] == "--set"
    assert loaded.overridden()["run.workspace"] == "--workspace"
    assert loaded.overridden()["logging.debug"] == "environment variable DEBUG_MODE"
    assert "run.name" not in loaded.overridden()


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("stages.grade.listener.cpus_per_task=2", "grade.listener", 2),
        ("stages.grade.cpus_per_task=3", "grade", 3),
        ("stages.sample={cpus_per_task: 4}", "sample", 4),
    ],
)
def test_set_reaches_stages_whose_name_has_a_dot(override: str, key: str, expected: int, small: Load) -> None:
    assert small(override).stages[key].cpus_per_task == expected


def test_set_takes_any_yaml(small: Load) -> None:
    config = small(
        "speaker.lora={r: 16, target_modules: [q_proj, v_proj]}",
        "train.learning_rate=5e-7",
        "cluster.setup=[module load cuda, 'a: b']",
        "cluster.account=12345",
        "cluster.partition=null",
    )
    assert config.speaker.lora is not None
    assert config.speaker.lora.target_modules == ("q_proj", "v_proj")
    assert config.train.learning_rate == 5e-7
    assert config.cluster.setup == ("module load cuda", "a: b")
    assert (config.cluster.account, config.cluster.partition) == ("12345", None)


def test_a_setting_that_switches_lora_off_beats_the_variable(small: Load) -> None:
    assert small("speaker.lora={r: 16}", "speaker.lora=null", env={"LORA_RANK": "8"}).speaker.lora is None


def test_a_later_setting_wins(small: Load) -> None:
    assert small("run.seed=1", "run.seed=2").run.seed == 2


def test_relative_paths_start_at_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text(MINIMAL)
    config = load("configs/run.yaml", ["cluster.shared_roots=[data, /scratch]"], {}, "runs/../w", cwd=tmp_path)
    assert isinstance(config, LewisConfig)
    assert config.speaker.path == str(tmp_path / "models/speaker")
    assert config.run.workspace == tmp_path / "w"
    assert config.cluster.shared_roots == (tmp_path / "data", Path("/scratch"))


def test_variables_in_paths_are_expanded(small: Load) -> None:
    config = small(
        "speaker.path=${MODELS}/a",
        "listener.path=${OTHER:-$X/b}".replace("$X", "/x"),
        "data.embedding.path=~/c",
        "run.workspace=$SCRATCH/$USER/run",
        env={"MODELS": "/m", "HOME": "/home/u", "SCRATCH": "/s", "USER": "u"},
    )
    assert config.speaker.path == "/m/a"
    assert config.listener.path == "/x/b"
    assert config.data.embedding.path == "/home/u/c"
    assert config.run.workspace == Path("/s/u/run")


def test_shell_lines_and_prompts_keep_their_dollars(small: Load) -> None:
    config = small("cluster.setup=['export A=$B']", "cluster.env={A: $B}", "data.speaker_problem=It costs $5 ~")
    assert config.cluster.setup == ("export A=$B",)
    assert config.cluster.env == {"A": "$B"}
    assert config.data.speaker_problem == "It costs $5 ~"


def test_a_program_without_slash_is_left_to_the_path(small: Load) -> None:
    config = small("cluster.python=python3", "stages.sample.python=envs/a/bin/python")
    python = config.stages["sample"].python
    assert config.cluster.python == "python3"
    assert python is not None and python.startswith("/") and python.endswith("/envs/a/bin/python")


def test_a_heterogeneous_job_is_looked_at_where_the_run_has_it(tmp_path: Path) -> None:
    base = "recipe: prosetting\nrun: {name: a}\nsolver: {path: m}\nquestions: {file: q.json}\n"
    (tmp_path / "run.yaml").write_text(base + "stages: {grade: {tasks: 2}, enhance: {tasks: 2}}\n")
    together = (
        "services.teacher.placement=hetjob",
        "services.teacher.model=m",
        "services.enhancer.client.url=http://e",
    )

    def faults(*more: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load("run.yaml", [*together, *more], env={}, cwd=tmp_path)
        return str(caught.value)

    both = faults()
    assert "grade and grade.teacher are one job" in both and "enhance and enhance.teacher are one job" in both
    assert "enhance.enhancer" not in both
    assert "enhance.teacher" not in faults("enhance.teacher=enhancer")


def test_a_solver_that_is_never_trained_is_noted(tmp_path: Path) -> None:
    base = "recipe: prosetting\nrun: {name: a, rounds: 2}\nsolver: {path: m}\nquestions: {file: q.json}\n"
    (tmp_path / "run.yaml").write_text(base)
    (note,) = load_with_places("run.yaml", env={}, cwd=tmp_path).notes
    assert "train_start_round is 3 and run.rounds 2" in note
    assert load_with_places("run.yaml", ["run.rounds=3"], env={}, cwd=tmp_path).notes == ()


def test_the_workspace_is_named_after_the_run(small: Load, tmp_path: Path) -> None:
    assert small().run.workspace == tmp_path / "runs" / "small"


def test_every_stage_is_there_and_inherits_from_the_cluster(small: Load) -> None:
    config = small(
        "cluster={partition: gpu, constraint: a100, setup: [a], python: p}",
        "cluster={env: {A: '1', B: '1'}, sbatch: {exclude: n1}}",
        "stages.grade={partition: cpu, constraint: '', setup: [], env: {B: '2'}, sbatch: {nice: 5}}",
    )
    assert set(config.stages) == set(LewisConfig.stage_names or ())
    sample, grade = config.stage("sample"), config.stage("grade")
    assert (sample.partition, sample.constraint, sample.setup, sample.python) == ("gpu", "a100", ("a",), "p")
    assert (grade.partition, grade.constraint, grade.setup, grade.python) == ("cpu", None, (), "p")
    assert grade.env == {"A": "1", "B": "2"}
    assert grade.sbatch == {"exclude": "n1", "nice": 5}


def test_a_recipe_of_ones_own_needs_no_config_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_recipes").mkdir()
    (tmp_path / "my_recipes" / "plain.py").write_text("")
    (tmp_path / "run.yaml").write_text("recipe: my_recipes.plain\nrun: {name: a}\nstages: {anything: {tasks: 3}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = load("run.yaml", env={}, cwd=tmp_path)
    assert type(config) is Config
    assert config.stages["anything"].tasks == 3


def test_a_recipe_of_ones_own_may_bring_a_config_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_recipes").mkdir()
    (tmp_path / "their_recipes" / "typed.py").write_text(
        "from hpc_rl.config.schema import Config\nclass Mine(Config):\n    depth: int = 3\nCONFIG = Mine\n"
    )
    (tmp_path / "run.yaml").write_text("recipe: their_recipes.typed\nrun: {name: a}\ndepth: 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = load("run.yaml", env={}, cwd=tmp_path)
    assert to_json(config)["depth"] == 4
    assert from_json(to_json(config)) == config


def test_a_recipe_that_cannot_be_imported_is_an_error_of_the_config(small: Load) -> None:
    with pytest.raises(ConfigError, match="no_such_package"):
        small("recipe=no_such_package.recipe")


def test_json_is_read_back_as_the_same_config(small: Load) -> None:
    config = small("speaker.lora={r: 8}", "services.listener.port_range=[9000, 9010]", "cluster.sbatch={nice: 1}")
    assert from_json(to_json(config)) == config


def test_a_config_cannot_be_changed(small: Load) -> None:
    with pytest.raises(Exception, match="frozen"):
        small().run.seed = 3  # type: ignore[misc]
