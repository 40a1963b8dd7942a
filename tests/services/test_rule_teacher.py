"""Teachers that are a function instead of a model (S2, S3): over real HTTP, side by side, within the same limits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from hpc_rl import config as configs
from hpc_rl.config.schema import Config
from hpc_rl.config.services import TeacherServiceConfig
from hpc_rl.run.workspace import Workspace
from hpc_rl.services import enhancer, handoff, teacher
from hpc_rl.services.address import Address
from hpc_rl.services.calling import ServiceRefused
from hpc_rl.services.frame import CannotServe
from hpc_rl.services.hosting import Hosted, host
from hpc_rl.teachers import enhancing, judging, sums
from hpc_rl.teachers.client import TeacherClient
from hpc_rl.teachers.questions import Question, Reply, TeacherError
from tests.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = {"teacher": teacher, "enhancer": enhancer}
SUMS, ECHO = "hpc_rl.teachers.sums:teacher", "tests.services.rules_of_tests:echo"


@dataclass
class Lab:
    """A workspace, and teachers for it."""

    ws: Workspace
    hosted: list[Hosted] = field(default_factory=list)

    def config(self, rules: str, **options: Any) -> Config:
        """A config in which both teachers follow these rules."""
        client = {"timeout_s": PATIENCE_S, "deadline_s": PATIENCE_S, "backoff_factor": 0.02, "max_tokens": 50}
        section = {"engine": "rules", "rules": rules, "batch_wait_ms": 0, "client": client, **options}
        services = {"teacher": section, "enhancer": section}
        return Config.model_validate({"run": {"name": "t", "workspace": self.ws.root}, "services": services})

    def serve(self, config: Config, name: str = "teacher") -> Hosted:
        options: Any = config.services.of(name)
        service = PAGES[name].open_service(self.ws, config, 0, options)
        where = Address("127.0.0.1", "127.0.0.1")
        folder, environ = self.ws.service_dir(name), {"HPC_RL_JOB_ID": str(len(self.hosted))}
        self.hosted.append(host(service, folder=folder, address=where, options=options, environ=environ))
        return self.hosted[-1]

    def post(self, **body: Any) -> httpx.Response:
        url = f"{self.hosted[0].publication.endpoint.url}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {handoff.read_token(self.ws.service_dir('teacher'))}"}
        return httpx.post(url, json={"model": ECHO, **body}, headers=headers, trust_env=False, timeout=PATIENCE_S)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(Workspace(tmp_path / "run"))
    yield made
    for hosted in made.hosted:
        hosted.leave(0.0)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_grader_and_an_enhancer_are_served_side_by_side(lab: Lab) -> None:
    config = lab.config(SUMS)
    for name in PAGES:
        assert lab.serve(config, name).service.name == name
    attempts = {"210": True, "21": False, "012": False}
    with TeacherClient.of_run(lab.ws, config) as grader:
        verdicts = grader.ask_all([judging.ask("07+05=", "210", attempt) for attempt in attempts])
        assert [isinstance(v, Reply) and judging.is_right(v.value) for v in verdicts] == list(attempts.values())
    chat = enhancing.messages("harder", "07+05=", "210", None)
    with TeacherClient.of_run(lab.ws, config, service="enhancer") as writer:
        how: dict[str, Any] = {"temperature": 0.7, "max_tokens": 50, "has_control_token": lambda text: False}
        asked = [enhancing.ask(chat, "07+05=", seed=seed, **how) for seed in range(20)]
        replies = writer.ask_all(asked)
        assert writer.ask_all(asked) == [
            Reply(r.text, r.value, r.finish_reason, r.prompt_tokens, r.completion_tokens, True)
            for r in replies
            if isinstance(r, Reply)
        ]
    variants = {enhancing.read(reply.value) for reply in replies if isinstance(reply, Reply)}
    assert len(variants) > 5
    for variant in variants:
        assert variant.answer == sums.answer(*(sums.parse(variant.question) or ()))
    items = [hosted.service.batcher.counters.items for hosted in lab.hosted]
    assert items == [3, 20]


def test_words_are_its_tokens_and_limits_hold_as_for_a_model(lab: Lab) -> None:
    lab.serve(lab.config(ECHO, max_model_len=8, max_tokens=5))
    said = lab.post(messages=user("one  two\nthree"), seed=7).json()
    assert said["choices"][0] == {
        "index": 0, "message": {"role": "assistant", "content": "one  two\nthree 7"}, "finish_reason": "stop",
    }  # fmt: skip
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    cut = lab.post(messages=user("one  two\nthree"), seed=7, max_tokens=2).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("one  two", "length")
    stopped = lab.post(messages=user("one two"), seed=7, stop=["two"]).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("one ", "stop")
    long = lab.post(messages=user("one two three"), max_tokens=6)
    assert long.status_code == 422 and "the prompt has 3 words and the answer may have 6; at most 8" in long.text
    assert lab.post(messages=user("one"), model="another").status_code == 404


def test_a_chat_that_the_rules_do_not_answer_is_left_out_and_costs_the_others_nothing(lab: Lab) -> None:
    config = lab.config(ECHO, batch_wait_ms=50)
    lab.serve(config)
    with TeacherClient.of_run(lab.ws, config) as client:
        yes, no, also = client.ask_all([Question(tuple(user(text)), seed=1) for text in ("yes", "no", "also")])
    assert isinstance(no, TeacherError) and "the rules have no answer: I would rather not" in no.message
    assert isinstance(yes, Reply) and isinstance(also, Reply) and (yes.text, also.text) == ("yes 1", "also 1")


def test_rules_that_were_changed_answer_anew(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    config = lab.config("changing_rules:answer")
    answers = []
    for text in ("old", "new"):
        (tmp_path / "changing_rules.py").write_text(f"def answer(messages, seed):\n    return '{text} answer'\n")
        sys.modules.pop("changing_rules", None)
        sys.path_importer_cache.clear()
        hosted = lab.serve(config)
        with TeacherClient.of_run(lab.ws, config) as client:
            for _ in range(2):
                answers += [(r.text, r.cached) for r in client.ask_all([Question(tuple(user("?")))])]  # type: ignore[union-attr]
        hosted.leave(0.0)
    assert answers == [("old answer", False), ("old answer", True), ("new answer", False), ("new answer", True)]


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("no.such:function", r"services\.enhancer\.rules: no\.such:function cannot be imported .* a module of this"),
        (
            "hpc_rl.teachers.sums:rhymes",
            r"services\.enhancer\.rules: .*: hpc_rl\.teachers\.sums has no function rhymes",
        ),
    ],
)
def test_rules_that_are_not_there_say_what_to_change(lab: Lab, rules: str, why: str) -> None:
    with pytest.raises(CannotServe, match=why):
        lab.serve(lab.config(rules), "enhancer")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"engine": "rules"}, "null, but engine is rules"),
        ({"rules": SUMS}, "but engine is vllm"),
        ({"engine": "rules", "rules": SUMS, "model": "/models/judge"}, "engine rules has no model"),
        ({"engine": "rules", "rules": "sums.py"}, "should match pattern"),
    ],
    ids=["no function", "not followed", "and a model", "no name"],
)
def test_a_config_says_which_rules_and_that_they_are_followed(fields: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TeacherServiceConfig.model_validate(fields)


def test_a_run_without_an_enhancer_says_where_to_name_one(lab: Lab) -> None:
    config = Config.model_validate({"run": {"name": "t", "workspace": lab.ws.root}})
    with pytest.raises(ServiceRefused, match=r"there is no enhancer: .* services\.enhancer\.client\.url, or in"):
        TeacherClient.of_run(lab.ws, config, service="enhancer")


NO_ENHANCER = ["services.enhancer={engine: vllm, rules: null}"]
NOBODY = [*NO_ENHANCER, "services.teacher={engine: vllm, rules: null}"]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ([], []),
        (NO_ENHANCER, ["services.enhancer"]),
        (NOBODY, ["services.teacher", "services.enhancer"]),
        ([*NOBODY, "grade.judge=never"], ["services.teacher", "services.enhancer"]),
        ([*NOBODY, "grade.judge=never", "grade.check_references=false"], ["services.enhancer"]),
        ([*NOBODY, "enhance.teacher=teacher"], ["services.teacher"]),
        ([*NOBODY, "enhance.teacher=teacher", "services.teacher.client.url=http://a:1/v1"], []),
    ],
)
def test_a_launch_says_which_teacher_is_nowhere(settings: list[str], missing: list[str], tmp_path: Path) -> None:
    config = configs.load(REPOSITORY / "configs/tiny/prosetting.yaml", settings, {}, tmp_path, cwd=REPOSITORY)
    problems = list(config.file_problems())
    assert [problem.field for problem in problems] == missing
    assert all("client.url" in problem.way_out for problem in problems)
