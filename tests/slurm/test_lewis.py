"""The Lewis game on a real cluster, whole; and the kill matrix: whatever dies, the run has the very same samples.

In every case of the matrix samples and rewards are, one by one, those of a run that nobody disturbed. To save time a
case begins where its subject does, the stages before are copied from the undisturbed run, and ends where its subject
does: with the round's samples or their rewards, but for the first one. Training is killed in test_training.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import end_records
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import ClusterRun
from tests.slurm.small_lewis import (
    CONFIG,
    SAMPLING_ONLY,
    SMALL,
    UNHURRIED,
    assert_draws_the_same_samples,
    assert_grades_the_same_samples,
    holds_a_shard,
    in_the_middle_of_grading,
    samples_of,
)


def test_a_round_over_several_nodes_after_the_launcher_is_gone(undisturbed: ClusterRun) -> None:
    run = undisturbed
    assert run.status()["status"] == "finished"
    assert set(run.submissions().values()) == {1}, "nobody was killed, so everything was submitted once"
    hosts = {name: {end.host for end in end_records(run.ws, StageId(1, name))} for name in ("sample", "grade", "train")}
    assert len(hosts["train"]) == 2
    assert hosts["grade"].isdisjoint({"node4"})  # where the listener is
    assert len(run.manifests(1, "sample")) == 8 and len(samples_of(run)) == 32 * 4
    (trained,) = run.manifests(1, "train")
    assert trained.metrics["ranks"] == 2
    assert [run.manifests(round, "evaluate")[0].metrics["n_validation"] for round in (0, 1)] == [24, 24]
    assert any(run.ws.tb_dir.rglob("events.out.tfevents.*"))
    assert "1" in run.tool("hpc_rl.report").stdout


@pytest.mark.slow
def test_where_jobs_run_changes_no_sample(cluster: SlurmCluster, undisturbed: ClusterRun, tmp_path: Path) -> None:
    here = ClusterRun(cluster, tmp_path, CONFIG, SMALL)
    here.launch("--executor", "local")
    assert_grades_the_same_samples(here, undisturbed)
    assert here.manifests(1, "evaluate")[0].metrics["n_validation"] == 24


@pytest.mark.slow
def test_two_rounds_on_vllm_over_several_nodes_lift_the_accuracy(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = ClusterRun(cluster, tmp_path, CONFIG, ["run.rounds=2"])
    assert "you can log off" in run.launch().stdout
    assert not run.manifests(1, "sample"), "the launcher stayed until round 1 was under way"
    run.wait_until_finished(800)
    for round in (1, 2):
        sampled = run.manifests(round, "sample")
        assert len(sampled) >= 4 and len({m.host for m in sampled}) >= 2
        assert {m.host for m in run.manifests(round, "grade")}.isdisjoint({"node4"})  # where the listener is
        assert len(samples_of(run, round)) == 128 * 8
        (trained,) = run.manifests(round, "train")
        assert trained.metrics["ranks"] == 2
    first, last = (run.manifests(round, "evaluate")[0].metrics for round in (0, 2))
    assert first["accuracy_new_views"] < 0.45
    assert last["accuracy_new_views"] > first["accuracy_new_views"] + 0.25
    assert any((run.ws.tb_dir).rglob("events.out.tfevents.*"))
    assert "2" in run.tool("hpc_rl.report").stdout


def test_a_sampling_task_and_then_the_listener_are_killed(
    run_from: Callable[..., ClusterRun], undisturbed: ClusterRun
) -> None:
    run = run_from(settings=UNHURRIED)
    run.launch()
    run.kill_body("jobs.sample", holds_a_shard(run, "sample"))
    run.kill_body("jobs.serve", in_the_middle_of_grading(run))
    run.wait_until_finished()
    assert_grades_the_same_samples(run, undisturbed)
    assert run.manifests(1, "evaluate")[0].metrics["n_validation"] == 24


def test_a_node_that_dies_with_everything_on_it(run_from: Callable[..., ClusterRun], undisturbed: ClusterRun) -> None:
    run = run_from(settings=SAMPLING_ONLY)
    run.launch()
    run.wait_for(holds_a_shard(run, "sample"), "a shard to be under way")
    host = run.wait_for(lambda: run.bodies("jobs.sample"), "a sampling task")[0][0]
    with run.cluster.node_killed(host):
        run.wait_for(lambda: len(run.manifests(1, "sample")) == 8, "the others to do its shards")
    assert_draws_the_same_samples(run, undisturbed)


def test_an_array_element_that_is_cancelled(run_from: Callable[..., ClusterRun], undisturbed: ClusterRun) -> None:
    run = run_from(settings=SAMPLING_ONLY)
    run.launch()
    (attempt,) = run.attempts(1, "sample")
    run.wait_for(holds_a_shard(run, "sample"), "a shard to be under way")
    run.cluster.run(["scancel", f"{(attempt.job_ids or ('',))[0]}_0"])
    assert_draws_the_same_samples(run, undisturbed)


def test_preemption_with_requeue(run_from: Callable[..., ClusterRun], undisturbed: ClusterRun) -> None:
    run = run_from(settings=("stages.sample.partition=low", *SAMPLING_ONLY))
    run.launch()
    run.wait_for(holds_a_shard(run, "sample"), "a shard to be under way")
    urgent = run.cluster.sbatch(
        "--partition=high",
        "--nodes=3",
        "--exclude=node4",
        "--exclusive",
        "--wrap=sleep 5",
        f"--output={run.folder}/urgent.out",
    )
    run.cluster.wait_for_state(urgent, "RUNNING", "COMPLETED")
    assert_draws_the_same_samples(run, undisturbed)
