"""A round of progressive solver training whose attempts are written by hand: sums, in every zone. Not a test module."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.data.questions import Question, count_questions, iter_questions, shard_range
from hpc_rl.grading.samples import Sample, write_samples
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff
from hpc_rl.teachers import sums
from jobs import serve
from jobs.prosetting import questions
from tests.jobs.listening import arguments
from tests.waiting import PATIENCE_S, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
ZONES = ("mastered", "learning", "too_hard", "broken", "ungraded", "forgotten")
"""What becomes of the n-th question, again and again; `broken` are too hard because their reference is wrong."""
WRONG = "000"
"""The reference of the broken ones."""
SHARDS = 3


def new_round(root: Path, number: int = 24, **sections: Any) -> Workspace:
    """A run with a pool of sums and attempts at them, nothing graded yet.

    Parameters
    ----------
    sections
        Of the config, over those here: `services={"teacher": {…}}`.
    """
    root.mkdir(parents=True, exist_ok=True)
    file, held_out = root / "questions.json", root / "held_out.json"
    file.write_text(json.dumps([_row(n) for n in range(number)]))
    held_out.write_text(json.dumps([{"question": sums.question(99, n), "answer": sums.answer(99, n)} for n in (1, 2)]))
    config = {
        "recipe": "prosetting",
        "run": {"name": "t", "workspace": root / "run", "rounds": 2, "seed": 3, "linger_s": 1, "lease_ttl_s": 5},
        "cluster": {"executor": "local", "file_system_lag_s": 0},
        "solver": {"path": str(REPOSITORY / "models/tiny-solver")},
        "questions": {"file": file, "held_out_file": held_out, "system_prompt": None},
        "sample": {"engine": "transformers", "shards": SHARDS, "samples_per_prompt": 4},
        "grade": {"answers": "text", "judge": "not_right"},
        "enhance": {"failures_shown": 2},
    }
    made = ProSettingConfig.model_validate({**config, **sections})
    ws = open_run(made, root / "config.yaml").ws
    assert questions.main(arguments(ws, 0)) == 0
    _collect(ws)
    return ws


def _row(n: int) -> dict[str, str]:
    a, b = 11 + n, 19 + n // 2
    right = sums.answer(a, b)
    answer = WRONG if ZONES[n % len(ZONES)] == "broken" else right
    return {"question": sums.question(a, b), "answer": answer, "solution": answer}


def zone_of(question: Question) -> str:
    """One of `ZONES`, by the question's place in the file."""
    return ZONES[(int(question.root_id[1:]) - 1) % len(ZONES)]


def pool(ws: Workspace, round: int = 0) -> list[Question]:
    """The questions that a round's last stage left."""
    return list(iter_questions(manifest.read(ws, round, "pool", 0).path("questions.parquet")))


def attempts_at(question: Question) -> list[str]:
    """What the solver answers: as `ZONES` says."""
    terms = sums.parse(question.question)
    assert terms is not None
    right, wrong = sums.answer(*terms), sums.answer(terms[0] + 10, terms[1])
    return {
        "mastered": [right] * 4,
        "learning": [right, wrong, wrong, "I forget"],
        "too_hard": [wrong, wrong, "12", "no"],
        "broken": [right, right, right, "no"],
        "ungraded": [],
        "forgotten": [f" {right}\n", right, "nothing", wrong],
    }[zone_of(question)]


def _collect(ws: Workspace) -> None:
    job = load(ws.root, 1, "collect")
    job.folder.mkdir(parents=True, exist_ok=True)
    path = manifest.read(ws, 0, "pool", 0).path("questions.parquet")
    number = count_questions(path)
    for shard in job.shards():
        places = shard_range(number, job.stage.shards, shard.index)
        samples = [
            Sample(
                sample_id=f"r01-{question.question_id}-g{n}", row_id=question.question_id, role="solver", group=place,
                attempt=n, accepted=True, prompt_token_ids=(1, 2), token_ids=(3, n), logprobs=(-1.0, -0.5), text=text,
                finish_reason="stop", seed=n, weights_hash="w",
            )
            for place, question in zip(places, iter_questions(path, places), strict=True)
            for n, text in enumerate(attempts_at(question))
        ]  # fmt: skip
        output = shard.output("samples.parquet")
        write_samples(output, samples, Sample)
        assert shard.commit([output], made_from={})


def by_rules(body: Mapping[str, Any]) -> str:
    """What the rule teacher of sums answers to a chat completion."""
    return sums.teacher(body["messages"], body.get("seed", 0))


def tables(ws: Workspace, stage: str) -> dict[str, pa.Table]:
    """All rows that a stage of round 1 has written, by the name of the file."""
    made = [manifest.read(ws, 1, stage, shard) for shard in range(SHARDS)]
    names = {"grade": ("graded", "results", "broken"), "enhance": ("enhanced",)}[stage]
    return {name: pa.concat_tables([pq.read_table(one.path(f"{name}.parquet")) for one in made]) for name in names}


def metrics(ws: Workspace, stage: str) -> Mapping[str, float]:
    """What the shards of a stage of round 1 have counted, together."""
    made = [manifest.read(ws, 1, stage, shard).metrics for shard in range(SHARDS)]
    return {name: sum(one[name] for one in made) for name in made[0]}


@contextmanager
def service(ws: Workspace, stage: str) -> Iterator[None]:
    """`jobs.serve` of a stage in a thread, as the debug executor runs it; it leaves when its consumer is done."""
    thread = threading.Thread(target=serve.main, args=([*arguments(ws), "--stage", stage],), daemon=True)
    thread.start()
    folder = ws.service_dir(stage.rpartition(".")[2])
    wait_for(lambda: handoff.discover(folder) or not thread.is_alive(), "the teacher")
    assert thread.is_alive()
    yield
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it did not leave"
