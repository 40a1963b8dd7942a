"""`doctor` (S14): what it finds in configs, files, workspaces, on real servers and this machine, with a remedy each."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hpc_rl import config as configs
from hpc_rl import doctor, recipes
from hpc_rl.health import packages, paths, slurm
from hpc_rl.health.disk import CHECKPOINT, estimate
from hpc_rl.health.endpoints import endpoint
from hpc_rl.health.findings import Subject
from hpc_rl.health.machine import machine
from hpc_rl.health.packages import extra_requirements, satisfies
from hpc_rl.health.paths import weights_bytes
from hpc_rl.health.slurm import Nodes, fits, read_sinfo
from hpc_rl.orchestrate.reconcile import DRIVER_LEASE
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.lease import acquire
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.manifest import Manifest
from tests.waiting import PATIENCE_S

ROOT = source_root()
KEY = "sk-of-the-tests"
SOLVER = """
recipe: prosetting
run: {{name: solver, rounds: 3, workspace: {folder}/run}}
cluster: {{executor: local}}
solver: {{path: {root}/models/tiny-solver, dtype: float32}}
questions: {{file: {folder}/questions.json}}
sample: {{engine: transformers, max_tokens: 100, shards: 3}}
train_start_round: 2
grade: {{answers: text}}
services: {{teacher: {{engine: rules, rules: "hpc_rl.teachers.sums:teacher"}}}}
"""

Found = list[dict[str, str]]
Ask = Callable[..., Found]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config of progressive solver training, with all that it needs."""
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    file = tmp_path / "solver.yaml"
    file.write_text(SOLVER.format(folder=tmp_path, root=ROOT))
    return file


@pytest.fixture
def ask(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The findings on that config with `--set` values; each has a remedy, and the exit code says what there is."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)
    monkeypatch.setattr(doctor, "QUICK_S", PATIENCE_S)  # of a busy machine; the limit has a test of its own

    def asked(*settings: str, quick: bool = True) -> Found:
        words = [str(config), "--json", *(["--quick"] if quick else [])]
        code = doctor.main([*words, *(part for setting in settings for part in ("--set", setting))])
        found: Found = json.loads(capsys.readouterr().out)
        assert code == any(finding["level"] == "problem" for finding in found)
        assert all(finding["remedy"] for finding in found if finding["level"] != "ok")
        return found

    return asked


def of(found: Found, area: str, level: str) -> list[str]:
    return [one["what"] for one in found if (one["area"], one["level"]) == (area, level)]


def only(found: Found, area: str, level: str) -> str:
    (what,) = of(found, area, level)
    return what


def subject_of(config: Path, *settings: str, **more: Any) -> Subject:
    loaded = configs.load(config, settings, {}, cwd=config.parent)
    return Subject(loaded, recipes.graph_of(loaded), "local", **more)


# configs and files


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tiny").glob("*.yaml")), ids=lambda path: path.stem)
def test_nothing_stands_in_the_way_of_the_tiny_configs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert doctor.main([str(file), "--workspace", str(tmp_path / "run")]) == 0
    assert "problem" not in capsys.readouterr().out


def test_s14_a_run_that_could_start_has_only_good_findings(ask: Ask) -> None:
    found = ask(quick=False)
    assert {one["level"] for one in found} == {"ok"}
    assert [one["area"] for one in found] == ["config", "paths", "paths", "disk", "state", "GPUs", "packages"]


def test_every_fault_of_a_config_is_a_finding(ask: Ask) -> None:
    found = ask("sample.max_tokens=0", "grade.answers=maths")
    assert {one["area"] for one in found} == {"config"}
    assert len(of(found, "config", "problem")) == 2
    assert any("sample.max_tokens" in what for what in of(found, "config", "problem"))


def test_missing_models_and_bad_rows_are_named_with_the_line_and_who_set_the_field(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_text('[\n  {"question": "a?", "answer": "1"},\n  {"question": "b?"}\n]\n')
    found = ask("solver.path=nowhere")
    model, row = of(found, "paths", "problem")
    assert model.startswith("--set: solver.path: the model folder") and model.endswith("nowhere does not exist")
    assert "questions.json" in row and "line 3" in row


def test_quick_does_not_read_large_files(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "questions.json").write_text('[{"question": "a?"}]')
    monkeypatch.setattr(paths, "QUICKLY_READ_BYTES", 10)
    quick, thorough = ask(), ask(quick=False)
    assert "its rows are read without --quick" in of(quick, "paths", "ok")[-1]
    assert not of(quick, "paths", "problem") and of(thorough, "paths", "problem")


@pytest.mark.parametrize("quick", [True, False])
def test_what_is_missing_beside_a_large_file_is_found(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    monkeypatch.setattr(paths, "QUICKLY_READ_BYTES", 10)
    gone = f"questions.held_out_file={tmp_path}/gone.json"
    found = ask(gone, "services.teacher={engine: vllm, rules: null}", quick=quick)
    said = of(found, "paths", "problem")
    assert any("questions.held_out_file" in what and "gone.json" in what for what in said)
    assert any("services.teacher: nobody to ask" in what for what in said)


def test_a_run_whose_round_0_is_done_needs_no_question_file_any_more(ask: Ask, config: Path, tmp_path: Path) -> None:
    run = open_run(configs.load(config, [], {}, cwd=tmp_path), config)
    (tmp_path / "questions.json").write_text('[{"question": "a?"}]')
    assert of(ask(), "paths", "problem")
    manifest.write(run.ws, Manifest(0, "pool", 0, ()))
    assert not of(ask(), "paths", "problem")
    (tmp_path / "questions.json").unlink()
    assert not of(ask(), "paths", "problem")


def test_the_page_says_what_to_do(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(config), "--quick", "--set", "solver.path=nowhere"]) == 1
    shown = capsys.readouterr().out
    assert all(len(line) <= doctor.WIDTH for line in shown.splitlines() if str(config.parent) not in line)
    assert "remedy: expected: a folder with config.json and *.safetensors" in " ".join(shown.split())
    assert shown.endswith("\n1 problem\n")


def test_a_check_that_hangs_is_given_up_and_named(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def hang(_: Subject) -> Iterator[Any]:
        over.wait()
        yield from ()

    monkeypatch.setattr(doctor, "disk", hang)
    monkeypatch.setattr(doctor, "QUICK_S", 0.5)
    try:
        assert doctor.main([str(config), "--quick"]) == 0
    finally:
        over.set()
    shown = capsys.readouterr().out
    assert "the check has not ended within 0.5 s" in shown and "state" in shown


def test_a_file_system_that_refuses_is_a_finding_and_no_traceback(ask: Ask, tmp_path: Path) -> None:
    found = ask(f"run.workspace={tmp_path / ('x' * 300)}")
    for area in ("paths", "disk", "state"):
        assert "File name too long" in only(found, area, "problem")
    assert of(found, "packages", "ok")


# disk


def test_room_is_estimated_from_models_samples_and_the_rounds_to_come(config: Path) -> None:
    weights = weights_bytes(ROOT / "models" / "tiny-solver")
    assert weights > 100_000
    samples = (20 + 24 + 28) * 8 * 100 * 24  # questions, which grow by what is replayed, × attempts × tokens × bytes
    need = estimate(subject_of(config))
    assert (need.kept, need.passing) == (2 * weights + samples, CHECKPOINT * weights), "rounds 2 and 3 train"
    capped = estimate(subject_of(config, "pool.max_questions=10"))
    assert capped.kept == 2 * weights + (20 + 10 + 10) * 8 * 100 * 24, "round 1 has all questions of the file"
    adapter = estimate(subject_of(config, "solver.lora={r: 8}"))
    assert adapter.passing < need.passing / 5 and adapter.kept < need.kept
    run = open_run(configs.load(config, [], {}, cwd=config.parent), config)
    for stage in run.graph.of_round(3):
        for shard in range(stage.shards if stage.has_work else 0):
            manifest.write(run.ws, Manifest(3, stage.name, shard, ()))
    assert estimate(subject_of(config)).kept == weights + samples * 44 // 72, "what is done takes no more room"


def test_too_little_room_for_models_is_a_problem_and_for_samples_a_warning(ask: Ask, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    per_question = 8 * 100 * 24
    samples = only(ask(f"pool.max_questions={free // per_question * 2}"), "disk", "warning")
    assert "the run still needs at most" in samples
    model = tmp_path / "large"
    model.mkdir()
    shutil.copy(ROOT / "models" / "tiny-solver" / "config.json", model)
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(free // 8)  # a hole: it takes no room itself, its checkpoints would
    assert "free at" in only(ask(f"solver.path={model}"), "disk", "problem")


# the workspace


def test_the_state_of_the_workspace(ask: Ask, config: Path, tmp_path: Path) -> None:
    assert "holds no run yet" in only(ask(), "state", "ok")
    run = open_run(configs.load(config, [], {}, cwd=tmp_path), config)
    for stage in run.graph.of_round(1):
        for shard in range(stage.shards if stage.has_work else 0):
            manifest.write(run.ws, Manifest(1, stage.name, shard, ()))
    assert "1 of 3 rounds are done; it is idle" in only(ask(quick=False), "state", "warning")
    lease = acquire(run.ws.lease_folder, DRIVER_LEASE, 60.0)
    assert lease is not None
    with lease:
        assert f"{lease.holder} drives it" in only(ask(), "state", "ok")
    assert "another config" in only(ask("dpo.beta=0.5"), "state", "problem")
    assert "dpo.beta" in only(ask("dpo.beta=0.5"), "state", "problem")
    Ledger(run.ws).append("stopped", why="the model does not fit")
    assert "it stopped: the model does not fit" in only(ask(), "state", "problem")
    Ledger(run.ws).append("resumed")
    Ledger(run.ws).append("paused", why="cancelled by the user")
    assert "it is paused: cancelled by the user" in only(ask(), "state", "warning")
    run.ws.root.chmod(0o777)
    assert any("others may write to" in what for what in of(ask(), "state", "problem"))
    run.ws.root.chmod(0o755)
    for damaged in ("{", "[1]"):
        run.ws.config_path.write_text(damaged)
        assert "cannot be read" in only(ask(), "state", "problem")


# endpoints


class Server:
    """A real HTTP server: by path a status and a body, after a while, for those who have the key."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[dict[str, Any]] = []
        self.key: str | None = None
        self.slow = threading.Event()
        self.slow.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.answer()

            def answer(self) -> None:
                server.slow.wait()
                refused = server.key is not None and self.headers.get("authorization") != f"Bearer {server.key}"
                status, body = (401, b"{}") if refused else server.answers.get(self.path, (404, b""))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.slow.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.answers["/v1/models"] = (200, json.dumps({"data": [{"id": "judge"}, {"id": "other"}]}).encode())
    made.answers["/health"] = (200, b"{}")
    yield made
    made.close()


def test_a_teachers_endpoint_is_asked_for_its_models_with_the_key_which_is_never_shown(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    url = f"services.teacher.client.url={server.url}/v1"
    here = ("services.teacher.rules=null", "services.teacher.engine=vllm", url, "services.teacher.client.model=judge")
    assert "refuses to answer without a key" in only(ask(*here), "endpoints", "problem")
    monkeypatch.setenv("TEACHER_API_KEY", "sk-wrong")
    found = ask(*here)
    assert "refuses the key in TEACHER_API_KEY" in only(found, "endpoints", "problem")
    assert "sk-wrong" not in json.dumps(found)
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    found = ask(*here)
    assert "answers, and has judge" in only(found, "endpoints", "ok")
    assert KEY not in json.dumps(found)
    assert "has no model 'another'" in only(ask(*here, "services.teacher.client.model=another"), "endpoints", "problem")
    assert "is null, and" in only(ask(*here, "services.teacher.client.model=null"), "endpoints", "problem")


def test_a_key_in_a_file_that_others_may_read_is_not_used(ask: Ask, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    here = (f"services.enhancer.client.url={server.url}/v1", f"services.enhancer.client.api_key_file={file}")
    here = (*here, "services.enhancer.client.model=judge")
    assert "others may know it" in only(ask(*here), "endpoints", "problem")
    file.chmod(0o600)
    server.key = KEY
    assert "services.enhancer.client" in only(ask(*here), "endpoints", "ok")


@pytest.mark.parametrize("inside", ["\n# of the group", "\r\nx", " x", "\u00e4"])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_key_that_no_header_may_carry_is_named_by_its_place_and_not_shown(
    ask: Ask, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, in_file: bool
) -> None:
    here = [f"services.teacher.client.url={server.url}/v1", "services.teacher.client.model=judge"]
    if in_file:
        file = tmp_path / "key"
        file.write_text(KEY + inside)
        file.chmod(0o600)
        here.append(f"services.teacher.client.api_key_file={file}")
    else:
        monkeypatch.setenv("TEACHER_API_KEY", KEY + inside)
    found = ask(*here)
    said = only(found, "endpoints", "problem")
    assert ("services.teacher.client.api_key_file" if in_file else "TEACHER_API_KEY") in said
    assert "a line break, a space" in said
    assert KEY not in json.dumps(found)


def test_one_question_is_asked_as_jobs_ask_it_and_not_with_quick(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    client = "services.teacher.client"
    here = (f"{client}.url={server.url}/v1", f"{client}.model=judge", f"{client}.extra_body={{top_p: 0.9}}")
    refusal = f"no response_format json_schema, {KEY}"
    server.answers["/v1/chat/completions"] = (400, refusal.encode())
    assert not of(ask(*here), "endpoints", "problem") and not server.asked
    found = ask(*here, quick=False)
    said = only(found, "endpoints", "problem")
    assert "answers 400 to a question with structured: json_schema: no response_format json_schema, ***" in said
    assert KEY not in json.dumps(found)
    (body,) = server.asked
    assert (body["model"], body["top_p"], body["response_format"]["type"]) == ("judge", 0.9, "json_schema")
    server.answers["/v1/chat/completions"] = (200, b"{}")
    found = ask(*here, f"{client}.structured=none", quick=False)
    assert "it takes a question with structured: none" in of(found, "endpoints", "ok")[-1]
    assert "response_format" not in server.asked[-1]
    server.answers["/v1/chat/completions"] = (503, b"")
    assert "answers 503" in only(ask(*here, quick=False), "endpoints", "warning")


def test_what_a_login_node_does_not_reach_compute_nodes_may(server: Server, config: Path) -> None:
    server.close()
    settings = (f"services.teacher.client.url={server.url}/v1", f"services.reward_model.client.url={server.url}")
    for executor, level in (("slurm", "warning"), ("local", "problem")):
        subject = replace(subject_of(config, *settings, quick=True), executor=executor)
        for name in ("teacher", "reward_model"):
            (finding,) = endpoint(subject, name, {})
            assert (finding.level, "no answer from" in finding.what) == (level, True)


def test_an_endpoint_that_is_away_or_hangs_or_is_another_thing(ask: Ask, server: Server) -> None:
    here = f"services.teacher.client.url={server.url}/v1"
    model = "services.teacher.client.model=judge"
    server.answers["/v1/models"] = (503, b"")
    assert "answers 503" in only(ask(here, model), "endpoints", "warning")
    server.answers["/v1/models"] = (200, b"<html>")
    assert "no list of models" in only(ask(here, model), "endpoints", "warning")
    server.slow.clear()
    assert "no answer from" in only(ask(here, model), "endpoints", "problem"), "it is not waited for longer"
    server.close()
    assert "no answer from" in only(ask(here, model), "endpoints", "problem")


def test_a_service_of_ours_that_runs_elsewhere_is_asked_for_its_health(ask: Ask, server: Server) -> None:
    here = f"services.reward_model.client.url={server.url}"
    assert "services.reward_model.client" in only(ask(here), "endpoints", "ok")
    server.answers["/health"] = (502, b"")
    assert "/health answers 502" in only(ask(here), "endpoints", "problem")


# this machine


def test_gpus_of_this_machine_against_those_that_stages_ask_for(
    ask: Ask, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ("stages.train.gpus_per_node=2", "dpo.reference=pass")
    driver = tmp_path / "gpus"
    assert [f.level for f in machine(subject_of(config, *two, quick=True), {}, driver)] == ["warning"]
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (driver / name).mkdir(parents=True)
    assert [f.level for f in machine(subject_of(config, *two, quick=True), {}, driver)] == ["ok"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert "train asks for 2 GPUs, and this machine has 1" in only(ask(*two), "GPUs", "problem")
    (ranks,) = [one for one in ask(*two, "stages.train.ranks_per_node=2") if one["area"] == "GPUs"]
    assert not of(ask(*two, *ranks["remedy"].replace("--set ", "").split()), "GPUs", "problem")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert "up to 2 GPUs at once; this machine shows 2" in only(ask(*two), "GPUs", "ok")
    assert "stages.train.mem_gb is 1e+06" in only(ask("stages.train.mem_gb=1000000"), "memory", "warning")


# packages


def test_a_version_is_compared_as_numbers() -> None:
    assert satisfies("2.13.0+cpu", "torch==2.13.0") and satisfies("2.13", "torch==2.13.0")
    assert not satisfies("2.9.1", "torch==2.13.0")
    assert satisfies("21.0.1", "pyarrow>=21") and not satisfies("20.9", "pyarrow>=21")
    assert satisfies("8.4", "pytest>=8,<9") and not satisfies("9.0", "pytest>=8,<9")
    assert satisfies("1.0", "numpy")


def test_the_extras_of_setup_cfg_hold_what_they_take_over_from_others() -> None:
    extras = extra_requirements(ROOT / "setup.cfg")
    assert set(extras["data"]) < set(extras["sample"])
    assert any(requirement.startswith("vllm==") for requirement in extras["sample"])
    assert extra_requirements(ROOT / "nowhere.cfg") == {}


def test_which_packages_a_stage_needs(config: Path) -> None:
    subject = subject_of(config, "grade.answers=math", "sample.engine=vllm", "evaluate.engine=transformers")
    stages = {stage.name: packages.extras(subject, stage) for stage in subject.graph.work}
    assert stages["collect"] == {"sample"}
    assert stages["grade"] == {"data", "solve", "teacher"}
    assert stages["train"] == {"train"}
    assert stages["evaluate"] == {"data", "solve"}
    served = next(stage for stage in subject.graph.stages if stage.name == "grade.teacher")
    assert packages.extras(subject, served) == {"serve", "data"}


def test_each_stages_interpreter_is_asked_for_its_packages(ask: Ask, tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    setting = f"stages.train.python={bare}"
    problems = of(ask(setting, quick=False), "packages", "problem")
    assert any(f"{bare} has no trl, for train" in what for what in problems)
    assert any("looked into without --quick" in what for what in of(ask(setting), "packages", "ok"))
    assert "cannot be started here" in only(
        ask("stages.train.python=/nowhere/python", quick=False), "packages", "problem"
    )
    broken = "stages.train.setup=['exit 3']"
    assert "does not work here: exit code 3" in only(ask(broken, quick=False), "packages", "problem")


# Slurm: its answers as sinfo(1) prints them; tests/slurm asks a real one

SINFO = """\
gpu*|up|3|64|515000|gpu:a100:4(S:0-1)|a100,ib|2-00:00:00
gpu*|up|1|32+|256000+|gpu:a100:2,nvme:1|a100|2-00:00:00
cpu|up|10|128|257000|(null)|(null)|infinite
old|down|2|16|64000|gpu:k80|k80|30:00
"""


def test_what_sinfo_prints_is_read() -> None:
    groups = read_sinfo(SINFO)
    assert groups[0] == Nodes("gpu", True, True, 3, 64, 515000, 4, frozenset({"a100", "ib"}), 2880)
    assert (groups[1].cpus, groups[1].memory_mb, groups[1].gpus) == (32, 256000, 2)
    assert (groups[2].gpus, groups[2].time_min, groups[2].is_default) == (0, None, False)
    assert (groups[3].gpus, groups[3].is_up, groups[3].time_min) == (1, False, 30)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"gpus_per_node": 4, "nodes": 3, "cpus_per_task": 16, "mem_gb": 400, "time_min": 2880}, ""),
        ({"partition": "gpu,cpu", "cpus_per_task": 128}, ""),
        ({"partition": "cpu", "time_min": 100_000}, ""),
        ({"gpus_per_node": 8}, "gpus_per_node: no node of partition gpu has 8 GPUs a node"),
        ({"gpus_per_node": 4, "nodes": 4}, "nodes is 4, and partition gpu has 3 that fit"),
        ({"cpus_per_task": 65}, "cpus_per_task: no node of partition gpu has 65 CPUs a node"),
        ({"gpus_per_node": 2, "cpus_per_task": 33}, "has 66 CPUs a node"),
        ({"mem_gb": 600}, "mem_gb: no node of partition gpu has 600.0 GiB a node"),
        ({"time_min": 2881}, "time_min: no node of partition gpu has 2881 minutes"),
        ({"constraint": "h100"}, "constraint: no node of partition gpu has h100 as a feature"),
        ({"constraint": "h100|a100"}, ""),
        ({"constraint": "ib", "nodes": 4}, "nodes is 4, and partition gpu has 3 that fit"),
        ({"partition": "cpu", "gpus_per_node": 1}, "no node of partition cpu has 1 GPUs a node"),
        ({"partition": "old"}, "partition old is not up"),
        ({"partition": "gpuu"}, "Slurm has no partition 'gpuu'"),
    ],
)
def test_what_a_stage_asks_for_against_the_partitions(wanted: dict[str, Any], said: str) -> None:
    found = [finding.what for finding in fits("train", configs.StageConfig.model_validate(wanted), read_sinfo(SINFO))]
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_a_cluster_without_a_default_partition_wants_one_named() -> None:
    (finding,) = fits("train", configs.StageConfig(), read_sinfo(SINFO.replace("*", "")))
    assert "Slurm has no default" in finding.what and "cluster.partition" in finding.remedy


def test_slurm_that_is_not_there_or_does_not_answer_is_said(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", f"{bin}:/nowhere")
    here = ("cluster.executor=slurm", "cluster.allow_local_workspace=true")
    assert "no sbatch on the PATH" in only(ask(*here), "Slurm", "problem")
    for name, body in {"sbatch": "exit 1", "sinfo": "exec /bin/sleep 60"}.items():
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    assert "has not answered within 0.8 s" in only(ask(*here), "Slurm", "problem")
    (bin / "sinfo").write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{SINFO}END\n")
    found = ask(*here, "stages.train.gpus_per_node=8")
    assert only(found, "Slurm", "ok") == "it answers: 3 partitions"
    assert "stages.train.gpus_per_node" in only(found, "Slurm", "problem")
    assert slurm.AREA not in {one["area"] for one in ask()}, "the local executor needs none"


def test_nodes_of_a_partition_that_differ_are_asked_for_one_kind_at_a_time(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sinfo puts idle nodes of 64 and of 512 GB into one line with the least of them, unless it is told not to."""
    (bin := tmp_path / "bin").mkdir()
    line = "gpu*|up|{}|{}|{}|gpu:4|a100|infinite"
    merged, *apart = line.format(4, "32+", "64000+"), line.format(2, 32, 64000), line.format(2, 64, 512000)
    shown = "\n".join(apart)
    tell = f'case " $* " in *" --exact "*) echo "{shown}";; *) echo "{merged}";; esac'
    for name, body in {"sbatch": "exit 1", "sinfo": tell}.items():
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/nowhere")
    large = ("cluster.executor=slurm", "cluster.allow_local_workspace=true", "stages.train.mem_gb=480")
    assert not of(ask(*large), "Slurm", "problem")
    assert "has 600.0 GiB" in only(ask(*large, "stages.train.mem_gb=600"), "Slurm", "problem")
