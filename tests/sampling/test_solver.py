"""What the solver is asked (S1): k attempts at each question of the pool, whatever the shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl.config.phases import SamplingConfig
from hpc_rl.config.prosetting import QuestionsConfig
from hpc_rl.data.questions import Question, chat, write_questions
from hpc_rl.engines.base import Completion
from hpc_rl.sampling.rules import Outcome
from hpc_rl.sampling.solver import ROLE, SolverSource
from hpc_rl.sampling.tasks import Task, TaskQueue

ATTEMPTS = 8
MADE = Completion((1,), (2,), (-0.1,), "4", "stop")


def question(number: int) -> Question:
    id = f"q{number:06d}"
    return Question(id, f"What is {number} + 1?", str(number + 1), None, id, None, 0, "", "train", "initial")


def source(folder: Path, questions: int, shards: int, **options: str | None) -> SolverSource:
    pool = folder / "questions.parquet"
    write_questions(pool, [question(number) for number in range(questions)])
    asked = QuestionsConfig.model_construct(**options)
    return SolverSource(SamplingConfig(samples_per_prompt=ATTEMPTS), asked, pool, 3, shards)


def tasks_of(made: SolverSource, shards: int) -> list[Task]:
    return [task for shard in range(shards) for task in made.tasks(shard)]


@pytest.mark.parametrize(("questions", "shards"), [(10_001, 7), (5, 5), (2, 64)])
def test_each_question_of_the_pool_is_in_one_shard_at_its_place_s1(tmp_path: Path, questions: int, shards: int) -> None:
    made = source(tmp_path, questions, shards)
    sizes = [len(made.tasks(shard)) for shard in range(shards)]
    assert max(sizes) - min(sizes) <= 1, "shards have as many questions as each other, or one more"
    tasks = tasks_of(made, shards)
    assert [task.group for task in tasks] == list(range(questions))
    assert [task.row_id for task in tasks] == [f"q{number:06d}" for number in range(questions)]
    assert tasks[-1].id == f"r03-q{questions - 1:06d}" and {task.role for task in tasks} == {ROLE}
    assert tasks == tasks_of(made, shards), "whoever asks again hears the same"


def test_k_attempts_are_drawn_and_all_of_them_count_s1(tmp_path: Path) -> None:
    made = source(tmp_path, 3, 1)
    queue = TaskQueue(made.tasks(0), made.rules)
    attempts = queue.start()
    assert len(attempts) == 3 * ATTEMPTS
    for attempt in attempts:
        assert not queue.finished(attempt, made.judge(attempt.task, MADE)), "nothing is drawn again"
    assert queue.done and not queue.exhausted()
    assert all(queue.history(task) == [Outcome(True)] * ATTEMPTS for task in queue.tasks)
    assert len({attempt.seed(0, 3) for attempt in attempts}) == len(attempts)


def test_a_question_is_put_as_the_config_says(tmp_path: Path) -> None:
    """By the one function that training and evaluation use, too; braces of a question are its own."""
    (task, *_) = source(tmp_path, 1, 1, system_prompt="Be brief.", prompt="Q: {question}\nA:").tasks(0)
    assert task.prompt.messages == (
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: What is 0 + 1?\nA:"},
    )  # fmt: skip
    plain = QuestionsConfig.model_construct(system_prompt=None)
    assert chat(plain, "Is {x} in {question}?") == [{"role": "user", "content": "Is {x} in {question}?"}]
