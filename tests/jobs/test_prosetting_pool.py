"""Round 0's pool and the pools after it (S9, S15, S16): real bodies in a workspace, over rounds of any results."""

from __future__ import annotations

import builtins
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hpc_rl import config as configs
from hpc_rl.data.question_files import QuestionFileError
from hpc_rl.data.questions import Question, count_questions, iter_questions, shard_range, text_key, write_questions
from hpc_rl.grading.broken import Broken, write_broken
from hpc_rl.grading.results import ZONES, result, write_results
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.shard import Shard
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.seeds import derive
from hpc_rl.run.workspace import Workspace
from jobs.prosetting import pool, questions

ROWS = [{"question": f"What is {i} + {i}?", "answer": 2 * i, "solution": f"{2 * i}"} for i in range(40)]

HAPPENS = ("failed", "replay", "broken", "unasked", "enhanced", "duplicates_dropped", "held_out_dropped")

NewRun = Callable[..., Workspace]


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """A run with these settings, whose round 0 has a pool of 32 questions: 29 to train on, 3 for validation."""

    def make(*settings: str, rows: Sequence[Any] = ROWS, prepare: bool = True) -> Workspace:
        root = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        file, config = tmp_path / "questions.jsonl", tmp_path / "run.yaml"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        config.write_text(
            f"recipe: prosetting\nrun: {{name: t, rounds: 4, linger_s: 1}}\nsolver: {{path: {tmp_path}}}\n"
            f"questions: {{file: {file}, held_out_fraction: 0.2}}\nsample: {{shards: 3}}\n"
        )
        open_run(configs.load(config, list(settings), {}, root, cwd=tmp_path), config)
        if prepare:
            assert questions.main(["--workspace", str(root), "--round", "0"]) == 0
        return Workspace(root)

    return make


def pool_of(ws: Workspace, round: int) -> list[Question]:
    """The questions that a round asks."""
    return list(iter_questions(manifest.read(ws, round - 1, "pool", 0).path("questions.parquet")))


def held_out(ws: Workspace) -> list[Question]:
    return list(iter_questions(manifest.read(ws, 0, "pool", 0).path("held_out.parquet")))


def answer(ws: Workspace, round: int) -> None:
    """Commit what grade and enhance might give; what becomes of a question depends on it and on the round alone."""
    path = manifest.read(ws, round - 1, "pool", 0).path("questions.parquet")
    forbidden = [one.question for one in held_out(ws)]
    earlier = [one.question for one in pool_of(ws, 1)]
    collect(ws, round)
    for stage in ("grade", "enhance"):
        for shard in load(ws.root, round, stage).shards():
            places = shard_range(count_questions(path), shard.job.stage.shards, shard.index)
            asked = list(zip(places, iter_questions(path, places), strict=True))
            luck = {one.question_id: derive(7, round, one.question_id) % 12 for _, one in asked}
            rights = {id: 4 if lucky < 4 else 2 if lucky < 8 else 0 for id, lucky in luck.items()}
            if stage == "grade":
                out, bad = shard.output("results.parquet"), shard.output("broken.parquet")
                write_broken(bad, [Broken(id, "2 and 2 is 4", "4") for id, lucky in luck.items() if lucky == 10])
                results = [
                    result(id, place, 0, 0, 4 if id > "q000030" else 0)
                    if luck[id] == 11
                    else result(id, place, rights[id], 4 - rights[id], 0)
                    for place, id in ((place, one.question_id) for place, one in asked)
                ]
                write_results(out, results)
                counts = {name: sum(getattr(one, name) for one in results) for name in ("right", "wrong", "left_out")}
                judged = counts["right"] + counts["wrong"]
                mean = counts["right"] / judged if judged else 0.0
                metrics = {"samples": 4 * len(asked), **counts, "mean_reward": mean}
                assert shard.commit([out, bad], made_from={}, metrics=metrics)
                continue
            variants = []
            for _, one in asked:
                lucky, id = luck[one.question_id], one.question_id
                if rights[id] == 0 or lucky == 0:
                    continue
                text = {1: forbidden[0].upper(), 2: earlier[0], 3: "The same?"}.get(
                    lucky, f"{one.question} And {round}?"
                )
                new_id = f"{id}.r{round:02d}"
                variants.append(
                    Question(new_id, text, "1", None, one.root_id, id, round, "harder", one.split, "enhanced")
                )
            new = shard.output("enhanced.parquet")
            write_questions(new, variants)
            assert shard.commit([new], made_from={})


def collect(ws: Workspace, round: int) -> None:
    """Commit that attempts were made; nobody here reads them."""
    for shard in load(ws.root, round, "collect").shards():
        assert shard.commit([], made_from={})


def play(ws: Workspace, rounds: int) -> None:
    for round in range(1, rounds + 1):
        answer(ws, round)
        assert pool.main(["--workspace", str(ws.root), "--round", str(round)]) == 0


def test_s15_round_0_makes_the_first_pool(new_run: NewRun, caplog: pytest.LogCaptureFixture) -> None:
    twice = [*ROWS, {"question": "what IS 3 + 3?", "answer": 7}]
    with caplog.at_level(logging.WARNING):
        ws = new_run(rows=twice)
    first, kept = pool_of(ws, 1), held_out(ws)
    assert "1 questions are there twice; the first counts: line 41 = line 4 (with another answer)" in caplog.text
    assert [len([one for one in first if one.split == split]) for split in ("train", "validation")] == [29, 3]
    assert {one.split for one in kept} == {"held_out"}
    assert sorted(one.question_id for one in (*first, *kept)) == [f"q{i:06d}" for i in range(1, 41)]
    assert [one.question_id for one in first] == sorted(one.question_id for one in first)
    one = next(one for one in (*first, *kept) if one.question_id == "q000004")
    assert (one.question, one.answer, one.solution) == ("What is 3 + 3?", "6", "6")
    assert all(
        (one.root_id, one.parent_id, one.made_in, one.reason) == (one.question_id, None, 0, "initial") for one in first
    )
    done = manifest.read(ws, 0, "pool", 0)
    assert [done.metrics[name] for name in ("questions", "train", "validation", "held_out")] == [32, 29, 3, 8]
    assert (done.metrics["duplicates_dropped"], done.metrics["contradictions"]) == (1, 1)
    assert json.loads(done.path("dataset_info.json").read_text())["files"] == done.made_from["files"]
    assert {output.path for output in done.outputs} == {
        "datasets/round_01/questions.parquet",
        "datasets/round_00/held_out.parquet",
        "datasets/round_00/dataset_info.json",
    }


def test_s15_held_out_questions_may_have_a_file_of_their_own(new_run: NewRun, tmp_path: Path) -> None:
    other = tmp_path / "held_out.json"
    other.write_text('[{"problem": "What is 100 + 100?", "answer": 200}]')
    ws = new_run(f"questions.held_out_file={other}")
    assert [(one.question_id, one.question, one.split) for one in held_out(ws)] == [
        ("h000001", "What is 100 + 100?", "held_out")
    ]
    assert [len(pool_of(ws, 1)), len({one.split for one in pool_of(ws, 1)})] == [40, 2]
    other.write_text('[{"problem": "What is 1 + 1?", "answer": 2}]')
    with pytest.raises(QuestionFileError, match="line 1 = line 2"):
        new_run(f"questions.held_out_file={other}")


def test_s9_pools_of_several_rounds_keep_their_promises(new_run: NewRun) -> None:
    ws = new_run("pool.replay_fraction=0.4")
    play(ws, 3)
    forbidden = {text_key(one.question) for one in held_out(ws)}
    known = {one.question_id: one for one in pool_of(ws, 1)}
    happened = dict.fromkeys(HAPPENS, 0)
    for round in range(1, 4):
        before, after = {one.question_id: one for one in pool_of(ws, round)}, pool_of(ws, round + 1)
        done = manifest.read(ws, round, "pool", 0)
        results = pq.read_table(done.path("results.parquet")).to_pylist()
        assert [row["question_id"] for row in results] == list(before)
        keys = [text_key(one.question) for one in after]
        assert len(set(keys)) == len(keys)
        assert not forbidden & set(keys)
        fates = {row["question_id"]: row["fate"] for row in results}
        to = {row["enhanced_to"]: row["question_id"] for row in results if row["enhanced_to"]}
        failed = {row["question_id"] for row in results if row["zone"] in ("too_hard", "ungraded")}
        assert {id for id, fate in fates.items() if fate == "failed"} == failed - {
            id for id, fate in fates.items() if fate in ("broken", "unasked")
        }
        assert {id for id, fate in fates.items() if fate == "unasked"} == {
            row["question_id"] for row in results if row["attempts"] == 0
        }
        others = [row for row in results if row["zone"] in ("mastered", "learning")]
        assert list(fates.values()).count("replay") == builtins.round(0.4 * len(others))
        assert [one.question_id for one in after if one.question_id in before] == [
            id for id, fate in fates.items() if fate in ("failed", "replay")
        ]
        new = [one for one in after if one.question_id not in before]
        assert [one.question_id for one in new] == list(to)
        for one in after:
            assert one.split == known[one.root_id].split
            if one.question_id in before:
                assert vars(one) == {**vars(before[one.question_id]), "reason": fates[one.question_id]}
            else:
                assert (one.reason, one.made_in, one.parent_id) == ("enhanced", round, to[one.question_id])
                assert one.question_id not in known
        known.update({one.question_id: one for one in after})
        assert (
            done.metrics["questions"]
            == len(after)
            == sum(done.metrics[name] for name in ("failed", "replay", "enhanced"))
        )
        assert 0 < done.metrics["diversity"] < 1
        happened = {name: number + done.metrics[name] for name, number in happened.items()}
    assert len({text_key(one.question) for one in known.values()}) == len(known), "nor in an earlier round"
    assert all(happened.values()), happened


def test_s9_a_pool_does_not_depend_on_how_the_work_was_cut(new_run: NewRun) -> None:
    made = []
    for shards, rounds in ((1, 2), (3, 2), (36, 1)):  # of 36 some are empty
        ws = new_run(f"sample.shards={shards}")
        play(ws, rounds)
        done = [manifest.read(ws, round, "pool", 0) for round in range(1, rounds + 1)]
        made.append([[one.path(f"{name}.parquet").read_bytes() for name in ("questions", "results")] for one in done])
    assert made[0] == made[1]
    assert made[0][:1] == made[2]
    assert pool_of(ws, 2)


def test_s16_everything_of_a_round_is_kept_where_its_results_say(new_run: NewRun) -> None:
    ws = new_run()
    play(ws, 2)
    for round in (1, 2):
        done = manifest.read(ws, round, "pool", 0)
        about = json.loads(done.path("results.json").read_text())
        graded = [manifest.read(ws, round, "grade", shard).metrics for shard in range(3)]
        assert about["questions"] == len(pool_of(ws, round)) == sum(about["zones"].values())
        assert about["attempts"]["right"] == sum(one["right"] for one in graded)
        assert about["mean_reward"] == pytest.approx(
            about["attempts"]["right"] / (about["attempts"]["right"] + about["attempts"]["wrong"]), abs=1e-6
        )
        assert about["next_pool"] == done.metrics
        assert len(about["broken"]) == done.metrics["broken"]
        assert about["files"]["questions"] == f"datasets/round_{round:02d}/questions.parquet"
        for name in ("questions", "rewards", "enhanced_questions", "results", "next_questions"):
            assert (ws.root / about["files"][name]).exists(), name
        for name in ("solver_training", "solver_validation", "generator_training", "trajectories"):
            assert about["files"][name].split("/")[1] == f"round_{round:02d}"


def test_a_run_goes_on_without_the_file_once_round_0_has_taken_its_questions_over_s15(
    new_run: NewRun, tmp_path: Path
) -> None:
    for prepared in (False, True):
        config = load(new_run(prepare=prepared).root, 0, "pool").config
        (tmp_path / "questions.jsonl").unlink()
        wrong = [problem.field for problem in config.file_problems()]
        assert ("questions.file" in wrong) is not prepared, wrong


def test_s18_reward_zones_and_diversity_are_curves(new_run: NewRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ws = new_run()
    play(ws, 2)
    points = EventAccumulator(str(ws.tb_dir / "run"))
    points.Reload()

    def curve(name: str) -> dict[int, float]:
        return {point.step: point.value for point in points.Scalars(name)}

    done = {round: manifest.read(ws, round, "pool", 0) for round in (0, 1, 2)}
    for name in ("questions", "diversity"):
        expected = {round: pytest.approx(one.metrics[name]) for round, one in done.items()}
        assert curve(f"pool/{name}") == expected
    rewards = {round: json.loads(done[round].path("results.json").read_text())["mean_reward"] for round in (1, 2)}
    assert curve("grade/mean_reward") == {round: pytest.approx(reward) for round, reward in rewards.items()}
    for zone in ZONES:
        assert curve(f"pool/zone_{zone}") == {round: done[round].metrics[f"zone_{zone}"] for round in (1, 2)}


@pytest.mark.parametrize("moment", ["still_ours", "commit"])
def test_a_pool_that_dies_before_it_is_committed_is_made_again_the_same(
    moment: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws, undisturbed = new_run(), new_run()
    play(undisturbed, 1)
    answer(ws, 1)

    def dies(*_: Any, **__: Any) -> bool:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, moment, dies)
        with pytest.raises(SystemExit):
            pool.main(["--workspace", str(ws.root), "--round", "1"])
    assert manifest.done_shards(ws, 1, "pool") == frozenset()
    assert pool.main(["--workspace", str(ws.root), "--round", "1"]) == 0
    for name in ("questions.parquet", "results.parquet", "results.json"):
        files = [manifest.read(run, 1, "pool", 0).path(name) for run in (ws, undisturbed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_a_variant_in_another_split_than_its_root_is_refused(new_run: NewRun) -> None:
    ws = new_run()
    answer(ws, 1)
    path = manifest.read(ws, 1, "enhance", 0).path("enhanced.parquet")
    rows = list(iter_questions(path))
    other = "train" if rows[0].split == "validation" else "validation"
    changed = path.with_name(f"x.{path.name}")
    write_questions(changed, [Question(**{**vars(rows[0]), "split": other}), *rows[1:]])
    expected = rows[0].root_id, rows[0].split
    roots = {one.question_id: (one.root_id, str(one.split)) for one in pool_of(ws, 1)}
    assert len(list(pool.read_variants([path], roots))) == len(rows)
    with pytest.raises(
        ValueError, match=rf"{rows[0].question_id} is a variant .* split {other}; expected \('{expected[0]}'"
    ):
        list(pool.read_variants([changed], roots))


def test_results_that_are_not_of_this_pool_are_refused(new_run: NewRun, tmp_path: Path) -> None:
    new_run(prepare=False)
    write_results(tmp_path / "a", [result("q1", 0, 1, 0, 0), result("q2", 1, 1, 0, 0)])
    assert pool.read_zones([tmp_path / "a"], ["q1", "q2"]) == (["mastered", "mastered"], set())
    with pytest.raises(ValueError, match="no result of q3, the question at place 2"):
        pool.read_zones([tmp_path / "a"], ["q1", "q2", "q3"])
    for ids in (["q1", "x"], ["q1"]):
        with pytest.raises(ValueError, match="a result of q2 at place 1, which the pool does not have there"):
            pool.read_zones([tmp_path / "a"], ids)
    with pytest.raises(ValueError, match="a result of q1 at place 0"):
        pool.read_zones([tmp_path / "a", tmp_path / "a"], ["q1", "q2"])


def test_a_round_that_leaves_no_question_says_so(new_run: NewRun, caplog: pytest.LogCaptureFixture) -> None:
    def all_mastered(ws: Workspace) -> None:
        collect(ws, 1)
        path = manifest.read(ws, 0, "pool", 0).path("questions.parquet")
        for stage in ("grade", "enhance"):
            for shard in load(ws.root, 1, stage).shards():
                places = shard_range(count_questions(path), 3, shard.index)
                ids = [one.question_id for one in iter_questions(path, places)]
                outs = [shard.output(name) for name in ("results.parquet", "broken.parquet", "enhanced.parquet")]
                write_results(outs[0], [result(id, place, 4, 0, 0) for place, id in zip(places, ids, strict=True)])
                write_broken(outs[1], [])
                write_questions(outs[2], [])
                metrics = {"samples": len(ids), "right": len(ids), "wrong": 0, "left_out": 0, "mean_reward": 1.0}
                assert shard.commit(outs[:2] if stage == "grade" else outs[2:], made_from={}, metrics=metrics)

    ws = new_run("pool.replay_fraction=0")
    all_mastered(ws)
    with pytest.raises(ValueError, match=r"round 1 leaves no question for round 2: .* run.rounds=1"):
        pool.main(["--workspace", str(ws.root), "--round", "1"])
    last = new_run("pool.replay_fraction=0", "run.rounds=1")
    all_mastered(last)
    with caplog.at_level(logging.WARNING):
        assert pool.main(["--workspace", str(last.root), "--round", "1"]) == 0
    assert "round 1 leaves no question for round 2" in caplog.text
    assert pool_of(last, 2) == []
