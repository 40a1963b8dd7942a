"""ProSetting runs whose pools and attempts are written by hand, for tests of the job bodies behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl.data.questions import Question, count_questions, shard_range, write_questions
from hpc_rl.grading.samples import Sample, write_samples
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.placing import commit_placed
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = Question("", "", "", None, "", None, 0, "", "train", "initial")


def open_prosetting(root: Path, *settings: str) -> Workspace:
    """A run of configs/tiny/prosetting.yaml in which nothing has been done."""
    file = REPOSITORY / "configs/tiny/prosetting.yaml"
    open_run(configs.load(file, [*settings, "run.linger_s=1"], {}, root, cwd=REPOSITORY), file)
    return Workspace(root)


def question(number: int, text: str, answer: str, **changes: object) -> Question:
    """A question of the file."""
    id = f"q{number:06d}"
    return replace(BASE, question_id=id, root_id=id, question=text, answer=answer, **changes)  # type: ignore[arg-type]


def publish_pool(ws: Workspace, round: int, questions: Sequence[Question]) -> None:
    """Commit the pool stage of a round, whose attempts are graded; the questions are those of the next."""
    if round:
        _enhance_nothing(ws, round)
    job = load(ws.root, round, "pool")
    job.folder.mkdir(parents=True, exist_ok=True)
    for shard in job.shards():
        path = shard.output("questions.parquet")
        write_questions(path, questions)
        final = ws.dataset_dir(round + 1) / "questions.parquet"
        assert commit_placed(shard, {path: final}, made_from={}, metrics={"questions": len(questions)})


def _enhance_nothing(ws: Workspace, round: int) -> None:
    job = load(ws.root, round, "enhance")
    job.folder.mkdir(parents=True, exist_ok=True)
    for shard in job.shards():
        assert shard.commit([], made_from={})


def publish_attempts(
    ws: Workspace, round: int, said: Mapping[str, Sequence[str]], cut_off: Sequence[tuple[str, int]] = (),
    refused: Sequence[tuple[str, int]] = (),
) -> None:  # fmt: skip
    """Commit the collect stage of a round.

    Parameters
    ----------
    said
        Texts of the attempts at each question that has some.
    cut_off, refused
        Attempts, by question and number, that are too long, and that do not count.
    """
    from hpc_rl.data.questions import iter_questions

    job, pool = load(ws.root, round, "collect"), pool_of(ws, round)
    job.folder.mkdir(parents=True, exist_ok=True)
    ids = [one.question_id for one in iter_questions(pool)]
    for shard in job.shards():
        samples = [
            Sample(
                sample_id=f"r{round:02d}-{ids[place]}-g{n}", row_id=ids[place], role="solver", group=place, attempt=n,
                accepted=(ids[place], n) not in refused, prompt_token_ids=(1, 2, place), token_ids=(3, n),
                logprobs=(-1.0, -0.5), text=text, finish_reason="length" if (ids[place], n) in cut_off else "stop",
                seed=n, weights_hash="w",
            )
            for place in shard_range(count_questions(pool), job.stage.shards, shard.index)
            for n, text in enumerate(said.get(ids[place], ()))
        ]  # fmt: skip
        path = shard.output("samples.parquet")
        write_samples(path, samples, Sample)
        assert shard.commit([path], made_from={})


def pool_of(ws: Workspace, round: int) -> Path:
    """The questions of a round."""
    return manifest.read(ws, round - 1, "pool", 0).path("questions.parquet")


def arguments(ws: Workspace, round: int = 1) -> list[str]:
    """The command line of a job body."""
    return ["--workspace", str(ws.root), "--round", str(round)]
