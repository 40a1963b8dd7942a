"""Attempts become graded attempts, pairs and texts: whole job bodies on pools and attempts that are written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hpc_rl.data.generator import usefulness
from hpc_rl.data.questions import Question
from hpc_rl.grading.results import Result, iter_results
from hpc_rl.grading.samples import read_graded, read_samples
from hpc_rl.grading.solver import SolverGraded
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.teachers import enhancing, judging, sections
from hpc_rl.training.data import pairs as training_pairs
from hpc_rl.training.data import store
from hpc_rl.training.data import texts as training_texts
from jobs.prosetting import dpo_data, grade
from tests.jobs.solving import REPOSITORY, arguments, open_prosetting, publish_attempts, publish_pool, question
from tests.teachers.server import Misbehave, Teacher

SOLVER = REPOSITORY / "models/tiny-solver"
MATH = ("grade.answers=math", "grade.check_references=false", "sample.shards=3", "sample.samples_per_prompt=4")
ALONE = (*MATH, "grade.judge=never")


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Teacher]:
    """A judge that calls right what says `fine`, and knows nothing of what says `odd`."""

    def judge(call: int, body: dict[str, Any]) -> str:
        attempt = sections.read(body["messages"][1]["content"])[judging.ATTEMPT]
        return "hm" if "odd" in attempt else json.dumps({"reason": "so", "correct": "fine" in attempt})

    monkeypatch.setenv("TEACHER_API_KEY", "sk")
    made = Teacher()
    made.behave = judge
    yield made
    made.die()


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Workspace]:
    return lambda *settings: open_prosetting(tmp_path / "run", *settings)


def client_of(teacher: Teacher, *more: str) -> tuple[str, ...]:
    options = {"url": teacher.url, "backoff_factor": 0.01, "deadline_s": 1, "timeout_s": 5, "model": "judge"}
    return (*(f"services.teacher.client.{name}={value}" for name, value in options.items()), *more)


def graded(ws: Workspace, round: int = 1, shards: int = 3) -> dict[str, list[SolverGraded]]:
    found: dict[str, list[SolverGraded]] = {}
    for shard in range(shards):
        for one in read_graded(manifest.read(ws, round, "grade", shard).path("graded.parquet"), SolverGraded):
            found.setdefault(one.row_id, []).append(one)
    return found


def results(ws: Workspace, round: int = 1, shards: int = 3) -> list[Result]:
    paths = [manifest.read(ws, round, "grade", shard).path("results.parquet") for shard in range(shards)]
    return [one for path in paths for one in iter_results(path)]


def total(ws: Workspace, name: str, stage: str = "grade", shards: int = 3) -> int:
    return sum(manifest.read(ws, 1, stage, shard).metrics[name] for shard in range(shards))


POOL = [
    question(1, "What is a half?", "1/2"),
    question(2, "What is two and two?", "4"),
    question(3, "What is the day after Sunday?", "Monday"),
    question(4, "Nobody tries this.", "1"),
    question(5, "What is three squared?", "9"),
]
SAID = {
    "q000001": [r"So \boxed{0.5}.", r"\boxed{\frac{1}{2}}", r"\boxed{2}", r"So \boxed{0.5}."],
    "q000002": [r"\boxed{4}", r"\boxed{4}", r"It is 4.", r"\boxed{4.0}"],
    "q000003": [r"\boxed{Monday}", r"\boxed{On Monday, fine}", r"\boxed{Tuesday}", r"\boxed{odd}"],
    "q000005": [r"\boxed{6}", r"\boxed{9}", "", r"\boxed{6}"],
}


def test_the_rule_grades_and_results_have_zones_s2_s4_s18(new_run: Callable[..., Workspace]) -> None:
    """S2, S4, S18: a judge is never asked, so what the rule cannot say is wrong; what is cut off is, too."""
    ws = new_run(*ALONE)
    publish_pool(ws, 0, POOL)
    publish_attempts(ws, 1, SAID, cut_off=[("q000005", 1)], refused=[("q000002", 3)])
    assert grade.main(arguments(ws)) == 0

    of = graded(ws)
    assert [one.reward for one in of["q000001"]] == [1, 1, 0, 1]
    assert [one.answer for one in of["q000001"]] == ["0.5", r"\frac{1}{2}", "2", "0.5"]
    assert [one.attempt for one in of["q000002"]] == [0, 1, 2], "what was not accepted is not graded"
    assert [one.reward_correctness for one in of["q000003"]] == [1, 0, 0, 0]
    assert [one.reward for one in of["q000005"]] == [0, 0, 0, 0], "9 was cut off"
    assert {one.graded_by for some in of.values() for one in some} == {"rule"}
    assert [(one.question_id, one.place, one.attempts, one.success_rate, one.zone) for one in results(ws)] == [
        ("q000001", 0, 4, 0.75, "learning"), ("q000002", 1, 3, 1.0, "mastered"), ("q000003", 2, 4, 0.25, "learning"),
        ("q000004", 3, 0, None, "ungraded"), ("q000005", 4, 4, 0.0, "too_hard"),
    ]  # fmt: skip
    assert [total(ws, name) for name in ("attempts", "samples", "right", "wrong", "left_out", "cut_off")] == [
        16, 15, 7, 8, 0, 1
    ]  # fmt: skip
    assert [total(ws, f"zone_{zone}") for zone in ("mastered", "learning", "too_hard", "ungraded")] == [1, 2, 1, 1]
    rewards = [manifest.read(ws, 1, "grade", shard).metrics["mean_reward"] for shard in range(3)]
    assert rewards == [0.75, pytest.approx(4 / 7, abs=1e-6), 0.0], "of the shards with one, two and two questions"


def test_what_is_passed_through_is_as_it_was_sampled_and_can_be_trained_on(new_run: Callable[..., Workspace]) -> None:
    ws = new_run(*ALONE)
    publish_pool(ws, 0, POOL)
    publish_attempts(ws, 1, SAID)
    assert grade.main(arguments(ws)) == 0
    for shard in range(3):
        sampled = read_samples(manifest.read(ws, 1, "collect", shard).path("samples.parquet"))
        path = manifest.read(ws, 1, "grade", shard).path("graded.parquet")
        assert read_samples(path) == sampled
        assert pq.read_schema(path).field("token_ids").type == pq.read_schema(path).field("prompt_token_ids").type
    paths = [manifest.read(ws, 1, "grade", shard).path("graded.parquet") for shard in range(3)]
    assert store.read(paths, parts=("correctness",), group_size=4, groups=None).counts.samples == 16


def test_a_teacher_judges_what_the_rule_cannot_each_text_once_s2(
    new_run: Callable[..., Workspace], teacher: Teacher
) -> None:
    """S2: rule first, teacher second. A teacher that says nothing of use leaves an attempt out: it is not wrong."""
    ws = new_run(*MATH, "grade.judge=unsure", *client_of(teacher, "services.teacher.client.bad_reply_retries=0"))
    publish_pool(ws, 0, POOL)
    again = {**SAID, "q000003": [*SAID["q000003"], r"\boxed{odd}", r"\boxed{On Monday, fine}"]}
    publish_attempts(ws, 1, again)
    assert grade.main(arguments(ws)) == 0
    of = graded(ws)["q000003"]
    assert [one.reward for one in of] == [1, 1, 0, None, None, 1]
    assert [one.graded_by for one in of] == ["rule", "teacher", "teacher", "", "", "teacher"]
    assert [one.left_out for one in of] == [False, False, False, True, True, False]
    assert results(ws)[2] == Result("q000003", 2, 6, 3, 1, 2, 0.75, "learning")
    assert teacher.calls == 3, "equal texts are asked once, and what the rule decides is not asked"
    assert [total(ws, name) for name in ("graded_by_teacher", "left_out", "teacher_calls", "teacher_errors")] == [
        3, 2, 3, 1
    ]  # fmt: skip


def test_a_teacher_may_judge_all_that_is_not_right_but_no_attempt_without_an_end(
    new_run: Callable[..., Workspace], teacher: Teacher
) -> None:
    ws = new_run(*MATH, "grade.judge=not_right", *client_of(teacher))
    publish_pool(ws, 0, POOL)
    said = {
        "q000002": [r"\boxed{5} fine", r"\boxed{5}", "fine, but", "  ", "<think>fine</think>"],
        "q000005": [r"\boxed{9}"] * 2,
    }
    publish_attempts(ws, 1, said, cut_off=[("q000002", 2)])
    assert grade.main(arguments(ws)) == 0
    assert [(one.reward, one.graded_by) for one in graded(ws)["q000002"]] == [
        (1, "teacher"), (0, "teacher"), (0, "rule"), (0, "rule"), (0, "rule")
    ]  # fmt: skip
    assert teacher.calls == 2


def test_without_a_teacher_the_stage_is_blocked_and_goes_on_later(
    new_run: Callable[..., Workspace], teacher: Teacher
) -> None:
    """What was answered before the teacher went is not asked again."""
    ws = new_run(*MATH, "grade.judge=unsure", *client_of(teacher, "services.teacher.client.parallel_calls=1"))
    publish_pool(ws, 0, POOL)
    publish_attempts(ws, 1, {"q000003": [rf"\boxed{{fine {n}}}" for n in range(4)]})
    answer = teacher.behave
    teacher.behave = lambda call, body: answer(call, body) if call <= 2 else Misbehave(503)
    assert grade.main(arguments(ws)) == 75
    assert 1 not in manifest.done_shards(ws, 1, "grade")
    calls, teacher.behave = teacher.calls, answer
    assert grade.main(arguments(ws)) == 0
    assert [one.reward for one in graded(ws)["q000003"]] == [1, 1, 1, 1]
    assert teacher.calls == calls + 2


def test_pieces_of_a_shard_give_what_the_whole_gives(
    new_run: Callable[..., Workspace], teacher: Teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A question whose attempts lie in two pieces is asked about once, too."""
    from hpc_rl.grading import samples

    ws = new_run(*MATH, "grade.judge=unsure", *client_of(teacher))
    publish_pool(ws, 0, POOL)
    monkeypatch.setattr(samples, "ROWS", 3)
    publish_attempts(
        ws, 1, {id: [f"{text} fine" if id == "q000003" else text for text in said] for id, said in SAID.items()}
    )
    monkeypatch.setattr(grade, "MOST_BYTES", 1)
    assert grade.main(arguments(ws)) == 0
    assert pq.ParquetFile(manifest.read(ws, 1, "grade", 1).path("graded.parquet")).num_row_groups > 1
    assert {id: [one.reward for one in some] for id, some in graded(ws).items()} == {
        "q000001": [1, 1, 0, 1], "q000002": [1, 1, 1, 1], "q000003": [1, 1, 1, None], "q000005": [0, 1, 0, 0],
    }  # fmt: skip


SUMS = [
    question(1, "01+02=", "300", solution="300"),
    question(2, "07+05=", "210", solution="210", split="validation"),
    question(3, "10+10=", "020"),
    question(4, "11+11=", "220", solution="220"),
    question(5, "12+11=", "320", solution="999"),
    question(6, "13+11=", "420", solution=r"\boxed{420}<eos>"),
]
SUMS_SAID = {
    "q000001": ["300", "300", "100", "200"],
    "q000002": ["210", "110", "110", "110"],
    "q000003": ["111", "222", "333", "444"],
    "q000004": ["111", "222", "333", "444"],
    "q000005": ["111", "222", "333", "444"],
    "q000006": ["111", "222", "333", "444"],
}
TEXT = (
    "sample.shards=3", "grade.judge=never", "grade.check_references=false", "sample.samples_per_prompt=4",
    "pairs.max_per_question=3",
)  # fmt: skip


def rows(ws: Workspace, round: int, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(manifest.read(ws, round, "dpo_data", 0).path(name)).to_pylist()
    return found


def test_pairs_lie_in_datasets_by_split_and_can_be_trained_on_s5_s16(new_run: Callable[..., Workspace]) -> None:
    """S5, S16: right × wrong, capped, each once; the reference solution where all failed, if it is usable."""
    from hpc_rl.engines.loading import load_processor

    ws = new_run(*TEXT)
    publish_pool(ws, 0, SUMS)
    publish_attempts(ws, 1, SUMS_SAID, cut_off=[("q000002", 1)])
    assert grade.main(arguments(ws)) == dpo_data.main(arguments(ws)) == 0
    folder = ws.dataset_dir(1)
    assert {path.name for path in folder.iterdir()} == {
        "questions.parquet", "train.parquet", "validation.parquet", "generator.parquet", "dataset_info.json"
    }  # fmt: skip
    train, validation = (rows(ws, 1, f"{name}.parquet") for name in ("train", "validation"))
    assert [(one["question_id"], one["chosen"], one["rejected"]) for one in train[:2]] == [
        ("q000001", "300", "100"), ("q000001", "300", "200")
    ]  # fmt: skip
    assert {one["question_id"] for one in train[2:]} == {"q000004"}
    assert {one["chosen_from"] for one in train[2:]} == {"reference"} and len(train) == 5
    assert [(one["question_id"], one["chosen"], one["rejected"]) for one in validation] == [("q000002", "210", "110")]
    assert train[0]["prompt"] == [{"role": "user", "content": "01+02="}]

    made = manifest.read(ws, 1, "dpo_data", 0)
    assert {name: made.metrics[name] for name in (
        "pairs_train", "pairs_validation", "pairs_new", "questions_with_pairs", "duplicates", "too_many",
        "no_reference_solution", "wrong_reference_solution", "unusable_reference_solution",
    )} == {
        "pairs_train": 5, "pairs_validation": 1, "pairs_new": 6, "questions_with_pairs": 3, "duplicates": 4,
        "too_many": 1, "no_reference_solution": 1, "wrong_reference_solution": 1,
        "unusable_reference_solution": 1,
    }  # fmt: skip
    assert list((ws.tb_dir / "run").glob("*.dpo_data-01")), "S18: numbers of pairs are a curve of the run"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["counts"]["pairs_train"] == 5 and info["rounds"] == {"train": [1], "validation": [1]}

    tokenizer = load_processor(SOLVER)
    read = training_pairs.read([made.path("train.parquet"), made.path("validation.parquet")], tokenizer)
    assert len(read) == 6


def test_the_tokens_of_a_pair_are_those_that_were_sampled(new_run: Callable[..., Workspace]) -> None:
    """What was cut off gets no end; a reference solution is what the chat template shows behind the prompt."""
    from hpc_rl.engines.loading import load_processor

    ws = new_run(*TEXT)
    publish_pool(ws, 0, SUMS)
    publish_attempts(ws, 1, SUMS_SAID, cut_off=[("q000001", 2)])
    assert grade.main(arguments(ws)) == dpo_data.main(arguments(ws)) == 0
    tokens = [
        [one[f"{name}_token_ids"] for name in ("prompt", "chosen", "rejected")] for one in rows(ws, 1, "train.parquet")
    ]
    assert tokens[:2] == [[[1, 2, 0], [3, 0], [3, 2]], [[1, 2, 0], [3, 0], [3, 3]]]
    tokenizer = load_processor(SOLVER)
    asked = [{"role": "user", "content": "11+11="}]
    opened = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "220"}], tokenize=False)
    assert [one[0] for one in tokens[2:]] == [[1, 2, 3]] * 3
    assert [one[1] for one in tokens[2:]] == [tokenizer(whole[len(opened) :])["input_ids"]] * 3


def test_nothing_is_learned_from_a_question_whose_reference_is_wrong_s4(tmp_path: Path, teacher: Teacher) -> None:
    """S4: found when all attempts of round 2 fail; its pairs of round 1 go as well, those of other questions stay."""

    def checks(call: int, body: dict[str, Any]) -> str:
        wrong = "11+11=" in body["messages"][1]["content"]
        return json.dumps({"reason": "so", "answer": "444" if wrong else "320", "reference_correct": not wrong})

    teacher.behave = checks
    ws = open_prosetting(tmp_path / "run", *TEXT, "grade.check_references=true", *client_of(teacher))
    for round, said in (1, ["220", "444"]), (2, ["444", "222"]):
        publish_pool(ws, round - 1, SUMS)
        publish_attempts(ws, round, {**SUMS_SAID, "q000004": said})
        assert grade.main(arguments(ws, round)) == dpo_data.main(arguments(ws, round)) == 0
    first, second = ({one["question_id"] for one in rows(ws, round, "train.parquet")} for round in (1, 2))
    assert first == {"q000001", "q000004"} and second == {"q000001"}
    assert manifest.read(ws, 2, "dpo_data", 0).metrics["broken"] == 1


def test_earlier_rounds_pairs_are_taken_over_or_not_s7(tmp_path: Path) -> None:
    """S7: `data_window`. A pair that there was already is not made again."""
    made = {}
    for window in ("all", "last"):
        ws = open_prosetting(tmp_path / window, *TEXT, f"data_window={window}")
        for round in (1, 2):
            publish_pool(ws, round - 1, SUMS)
            said = {**SUMS_SAID, **({"q000001": ["300", "100", "555"]} if round == 2 else {})}
            publish_attempts(ws, round, said)
            assert grade.main(arguments(ws, round)) == dpo_data.main(arguments(ws, round)) == 0
        made[window] = ws
    first, window_all, last = rows(made["all"], 1, "train.parquet"), *(rows(made[w], 2, "train.parquet") for w in made)
    assert window_all[: len(first)] == first
    new = window_all[len(first) :]
    assert [one["rejected"] for one in new if one["question_id"] == "q000001"] == ["555"]
    assert [one["question_id"] for one in new if one["question_id"] != "q000001"] == ["q000004"], "the fourth of 4"
    assert {one["round"] for one in last} == {2} and len(last) == 5
    assert len({one["pair_id"] for one in window_all}) == len(window_all)
    held = {one["root_id"] for one in rows(made["all"], 2, "validation.parquet")}
    assert held == {"q000002"} and held.isdisjoint(one["root_id"] for one in window_all), "nothing changes sides"
    info = json.loads((made["all"].dataset_dir(2) / "dataset_info.json").read_text())
    assert info["rounds"] == {"train": [1, 2], "validation": [1]} and info["window"] == "all"


def test_the_generator_learns_the_variants_that_are_half_solved_s17(new_run: Callable[..., Workspace]) -> None:
    """S17: prompt and completion as the teacher saw and said them, weighted by U(s)."""
    from hpc_rl.engines.loading import load_processor

    ws = new_run(*TEXT)
    publish_pool(ws, 0, SUMS[:2])
    publish_attempts(ws, 1, {})
    variant = Question(
        "q000001.r01", "05+06=", "110", "110", "q000001", "q000001", 1, "targeted", "train", "enhanced"
    )  # fmt: skip
    assert grade.main(arguments(ws, 1)) == dpo_data.main(arguments(ws, 1)) == 0
    publish_pool(ws, 1, [SUMS[1], variant])
    publish_attempts(ws, 2, {"q000001.r01": ["110", "010", "010", "000"], "q000002": ["210"]})
    assert grade.main(arguments(ws, 2)) == dpo_data.main(arguments(ws, 2)) == 0
    assert rows(ws, 1, "generator.parquet") == []
    (text,) = rows(ws, 2, "generator.parquet")
    assert tuple(text["prompt"]) == enhancing.messages("targeted", "01+02=", "300", "300")
    assert enhancing.read(json.loads(text["completion"])) == enhancing.Variant("05+06=", "110", "110")
    assert text["weight"] == pytest.approx(usefulness(0.25)) == pytest.approx(0.4578334)
    path = manifest.read(ws, 2, "dpo_data", 0).path("generator.parquet")
    tokenizer = load_processor(SOLVER)
    assert len(training_texts.read([path], tokenizer, weighted=True)) == 1
