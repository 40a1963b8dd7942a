"""Training on two ranks, DeepSpeed included, and killed in several ways: the result is that of an undisturbed run."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.grading.samples import read_samples
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.checkpointing.checkpoints import COMPLETE
from hpc_rl.training.errors import Diverged
from hpc_rl.training.reporting.reporter import Reporter
from jobs import train as job
from tests.training.conftest import NewRun, Ranks, start_ranks
from tests.waiting import PATIENCE_S, wait_for

ZERO3 = "train.deepspeed=configs/deepspeed/zero3.json"
TWO = ("stages.train.nodes=2", "train.per_device_batch_size=4")


def trained(ws: Workspace, round: int = 1) -> Any:
    return manifest.read(ws, round, "train", 0)


def weights(ws: Workspace, round: int) -> dict[str, torch.Tensor]:
    folder = ws.checkpoint_dir("speaker", round)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differ(one: Workspace, other: Workspace, round: int = 1) -> float:
    a, b = weights(one, round), weights(other, round)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def here(ws: Workspace) -> Any:
    """Train in this process, one rank."""
    assert job.main(["--workspace", str(ws.root), "--round", "1"]) == 0
    return trained(ws)


def checkpoints(ws: Workspace, round: int = 1) -> list[str]:
    return sorted(path.parent.name for path in ws.stage_dir(round, "train").glob(f"checkpoints/*/*/{COMPLETE}"))


def wait_for_checkpoint(ws: Workspace, ranks: Ranks, round: int = 1) -> None:
    wait_for(lambda: checkpoints(ws, round), ranks.said, within_s=2 * PATIENCE_S, of=ranks.processes[0])


def assert_right_rollouts_on_each_rank(metrics: Any, ranks: int = 2) -> None:
    first = metrics["first_step_by_rank"]
    assert [one["rank"] for one in first] == list(range(ranks))
    for one in first:
        assert one["tokens"] > 20 and one["clipped"] == 0 and one["logprob_difference_max"] < 1e-4


def test_zero3_goes_on_with_an_adapter_and_after_both_ranks_were_killed(
    new_run: NewRun, second: Path, plain_second: Workspace
) -> None:
    whole, killed = (new_run(*TWO, ZERO3, of=second, graded=False) for _ in range(2))
    ranks = start_ranks(whole, 2, round=2)
    assert ranks.wait() == [0, 0], ranks.said()
    assert_right_rollouts_on_each_rank(trained(whole, 2).metrics)
    assert differ(plain_second, whole, 2) < 2e-4

    ranks = start_ranks(killed, 2, round=2)
    wait_for_checkpoint(killed, ranks, 2)
    ranks.kill()
    assert not manifest.manifest_path(killed, 2, "train", 0).exists()
    ranks = start_ranks(killed, 2, job_id="2", round=2)
    assert ranks.wait() == [0, 0], ranks.said()
    assert trained(killed, 2).metrics["resumed_from_step"] in (2, 4)
    assert trained(killed, 2).made_from["weights_out"] == trained(whole, 2).made_from["weights_out"]
    assert not (killed.stage_dir(2, "train") / "checkpoints").exists()


def test_a_rank_that_loses_another_is_blocked_not_at_fault(new_run: NewRun) -> None:
    ws = new_run(*TWO, "train.epochs=200")
    ranks = start_ranks(ws, 2)
    try:
        wait_for_checkpoint(ws, ranks)
        ranks.processes[1].kill()
        assert ranks.processes[0].wait(PATIENCE_S) == EXIT_BLOCKED, ranks.said()
        assert "another rank is gone" in ranks.said()
    finally:
        ranks.kill()


def test_told_to_leave_it_saves_and_the_next_attempt_goes_on_along_the_same_curve(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, so that random states count; TensorBoard shows one curve, as if nothing had happened."""
    settings = ("train.save_steps=1000", "speaker.lora.dropout=0.1")
    whole, left = new_run(*settings), new_run(*settings)
    here(whole)

    told = Reporter.on_step_end

    def tell_in_step_3(reporter: Reporter, args: Any, state: Any, control: Any, **more: Any) -> None:
        told(reporter, args, state, control, **more)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as leave:
        patched.setattr(Reporter, "on_step_end", tell_in_step_3)
        here(left)
    assert leave.value.code == 128 + signal.SIGTERM
    assert len(checkpoints(left)) == 1, "saved although no checkpoint was due"
    made = here(left)
    assert made.metrics["resumed_from_step"] in (3, 4) and made.metrics["steps"] == 6
    assert made.made_from["weights_out"] == trained(whole).made_from["weights_out"], "to the last bit"
    assert curves(left) == curves(whole) and len(curves(whole)["train/loss"]) == 6


def curves(ws: Workspace) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of round 1, (step, value); what depends on the machine is left out."""
    shown = EventAccumulator(str(ws.tb_dir / "round_01/train")).Reload()
    tags = [tag for tag in shown.Tags()["scalars"] if not re.search("throughput|memory|step_time", tag)]
    return {tag: [(point.step, point.value) for point in shown.Scalars(tag)] for tag in tags}


def test_numbers_that_end_leave_the_last_good_checkpoint_and_name_it(new_run: NewRun) -> None:
    ws = new_run("train.learning_rate=1e36", "train.warmup_steps=0", "train.save_steps=1")
    with pytest.raises(Diverged) as stopped:
        here(ws)
    said = str(stopped.value)
    assert re.match(r"the (loss|gradients) of step 2 (is|are) not finite", said), said
    shards = [made.path("samples.parquet") for made in manifest.Manifests(ws, 1, "sample", 2)]
    assert any(sample.sample_id in said for shard in shards for sample in read_samples(shard))
    (kept,) = ws.stage_dir(1, "train").glob("checkpoints/*/checkpoint-1")
    assert said.endswith(f"The last good checkpoint is kept, and the next attempt goes on after its step: {kept}")
    assert not ws.checkpoint_dir("speaker", 1).exists()


def test_killed_while_saving_the_checkpoint_before_counts(new_run: NewRun, plain: Workspace, tmp_path: Path) -> None:
    killed = new_run()
    ranks = start_ranks(killed, 1, program=("tests.training.ranks", "killed_while_saving"))
    assert ranks.wait() == [-signal.SIGKILL], ranks.said()
    folders = sorted(path.name for path in killed.stage_dir(1, "train").glob("checkpoints/*/*"))
    assert folders == ["checkpoint-2", "checkpoint-4"] and checkpoints(killed) == ["checkpoint-2"]
    shutil.copytree(killed.root, tmp_path / "other")
    made = here(killed)
    assert made.metrics["resumed_from_step"] == 2
    assert made.made_from["weights_out"] == trained(plain).made_from["weights_out"]

    other = Workspace(tmp_path / "other")
    text = other.config_path.read_text()
    assert '"epsilon": 0.2' in text
    other.config_path.write_text(text.replace('"epsilon": 0.2', '"epsilon": 0.1'))
    assert here(other).metrics["resumed_from_step"] == 0, "that checkpoint was made with other settings"


def test_killed_between_the_final_weights_and_the_manifest(new_run: NewRun) -> None:
    whole = new_run()
    made = here(whole)
    manifest.manifest_path(whole, 1, "train", 0).unlink()
    again = here(whole)
    assert again.made_from["weights_out"] == made.made_from["weights_out"]
    assert {Path(o.path).name: o.sha256 for o in again.outputs} == {Path(o.path).name: o.sha256 for o in made.outputs}


def test_what_is_wrong_with_the_samples_is_said_by_every_rank_though_one_reads_them(new_run: NewRun) -> None:
    ws = new_run(*TWO)
    made = manifest.read(ws, 1, "grade", 1)
    ws.resolve(made.outputs[0].path).unlink()
    ranks = start_ranks(ws, 2)
    assert ranks.wait() == [1, 1], ranks.said()
    for log in ranks.logs:
        said = log.read_text()
        assert "is missing or changed since it was written. Remove" in said and "another rank is gone" not in said
