"""The one door to engines: which one it is and why, where its weights and caches lie, what it does about memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.cluster.entry import EndRecord, Spec
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines import weights
from hpc_rl.engines.memory import notches_of
from hpc_rl.engines.node_disk import NoNodeFolder, node_folder
from hpc_rl.engines.placing import Placed, place_weights
from hpc_rl.engines.staging import Staging
from hpc_rl.engines.vllm_start import VllmMissing
from hpc_rl.engines.weights import noted_hash, weights_hash
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import end_records
from hpc_rl.run import atomic
from hpc_rl.run.workspace import Workspace

from .opened_with import open_and_sample

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
FAILING = "raise ValueError('… on kv cache allocation is less than requested memory for kv (10000.0 GiB).')"


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment without vLLM: neither found nor importable."""
    monkeypatch.setitem(sys.modules, "vllm", None)


def test_without_vllm_auto_is_transformers_and_says_why(
    no_vllm: None, speaker_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        opened = open_and_sample({"base": str(speaker_folder), "sample": {"engine": "auto"}})
    assert opened["kind"] == opened["description"]["engine"] == "transformers"
    assert opened["description"]["asked"] == "auto"
    assert opened["description"]["why"].startswith(f"vLLM is not installed for {sys.executable}")
    (said,) = [message for message in caplog.messages if "engine auto" in message]
    assert "sampling with transformers" in said and "vLLM is not installed" in said


def test_vllm_without_vllm_is_an_error_with_the_ways_out(no_vllm: None, speaker_folder: Path) -> None:
    with pytest.raises(VllmMissing, match=r"not installed for .* set the engine to transformers; with auto"):
        open_and_sample({"base": str(speaker_folder), "sample": {"engine": "vllm"}})


def test_transformers_is_no_fallback_where_it_was_asked_for(
    speaker_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        opened = open_and_sample({"base": str(speaker_folder), "sample": {"engine": "transformers"}})
    assert "why" not in opened["description"] and not [m for m in caplog.messages if "engine auto" in m]
    assert opened["description"]["max_num_seqs"] == 32 and opened["loading"]["engine"] > 0


def test_weights_on_the_nodes_disk_are_the_same_weights(
    speaker_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    plain: dict[str, Any] = {"base": str(speaker_folder), "sample": {"engine": "transformers"}}
    adapted = {**plain, "adapter": str(adapter_folder)}
    on_disk = {"engine": "transformers", "stage_to": "$NODE_DISK/models"}
    expected, expected_adapted = open_and_sample(plain), open_and_sample(adapted)
    assert expected["tokens"] != expected_adapted["tokens"]

    first = open_and_sample({**plain, "sample": on_disk})
    assert first["tokens"] == expected["tokens"]
    assert first["description"]["staged_by"] == "this process" and "staging" in first["loading"]
    assert Path(first["description"]["staged"]).is_relative_to(tmp_path / "models")

    beside = open_and_sample({**adapted, "sample": on_disk})
    assert beside["tokens"] == expected_adapted["tokens"]
    assert beside["description"]["staged"] == first["description"]["staged"], "the adapter is read from where it lies"

    merged = [open_and_sample({**adapted, "sample": {**on_disk, "merge_adapter": True}}) for _ in range(2)]
    assert merged[0]["tokens"] == merged[1]["tokens"] == expected_adapted["tokens"]
    assert [m["description"]["staged_by"] for m in merged] == ["this process", "another process"]
    assert "merging" in merged[0]["loading"] and "staging" not in merged[0]["loading"]


def test_a_later_merger_replaces_that_of_the_round_before(
    speaker_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    staged = []
    for number in (1, 2):
        adapter = tmp_path / "speaker" / f"round_{number:02d}"
        shutil.copytree(adapter_folder, adapter)
        sample = {"engine": "transformers", "stage_to": str(tmp_path / "local"), "merge_adapter": True}
        opened = open_and_sample({"base": str(speaker_folder), "adapter": str(adapter), "sample": sample})
        staged.append(Path(opened["description"]["staged"]))
    assert not staged[0].exists() and staged[1].exists()


def merge(base: Path, adapter: Path, lent: ExitStack) -> Placed:
    """As for vLLM, without `stage_to`."""
    sample = SampleConfig(merge_adapter=True)
    return place_weights(str(base), adapter, sample, "float32", trained=False, merges=False, lent=lent)


def test_without_a_folder_on_the_node_a_merger_is_there_as_long_as_it_is_used(
    speaker_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ExitStack() as first:
        placed = merge(speaker_folder, adapter_folder, first)
        with ExitStack() as second:
            again = merge(speaker_folder, adapter_folder, second)
            assert again.base == placed.base and again.about["staged_by"] == "another process"
        assert placed.adapter is None and (Path(placed.base) / "model.safetensors").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
    code = (
        "import os, sys; from contextlib import ExitStack; from pathlib import Path; from engines import test_opening\n"
        "test_opening.merge(Path(sys.argv[1]), Path(sys.argv[2]), ExitStack()); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(speaker_folder), str(adapter_folder)]
    killed = subprocess.run(command, env={**ENVIRONMENT, "TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -9 and len(list(tmp_path.rglob("*.safetensors"))) == 1
    with ExitStack() as third:
        assert merge(speaker_folder, adapter_folder, third).about["staged_by"] == "another process"
    assert not list(tmp_path.glob("hpc_rl-*/**/*.safetensors"))
    tmp_path.chmod(0o777)
    with pytest.raises(NoNodeFolder, match=r"merge_adapter needs a folder .* Name one in sample\.stage_to"):
        merge(speaker_folder, adapter_folder, ExitStack())


def test_so_does_a_later_rounds_model_where_all_weights_are_trained(speaker_folder: Path, tmp_path: Path) -> None:
    disk, folders = tmp_path / "local", [tmp_path / "models" / "start"]
    folders += [tmp_path / "run" / "checkpoints" / "speaker" / f"round_{number:02d}" for number in (1, 2)]
    beside = tmp_path / "models" / "another"  # of another run, which may come back to it
    staged = []
    for folder in (beside, *folders):
        shutil.copytree(speaker_folder, folder)
        start = beside if folder == beside else folders[0]
        asked = {"start": str(start), "base": str(folder), "sample": {"engine": "transformers", "stage_to": str(disk)}}
        staged.append(Path(open_and_sample(asked)["description"]["staged"]))
    assert [copy.exists() for copy in staged] == [True, True, False, True]


def test_the_bases_hash_is_computed_once_and_again_when_its_files_change(speaker_folder: Path, tmp_path: Path) -> None:
    model, notes = tmp_path / "model", tmp_path / "notes"
    shutil.copytree(speaker_folder, model)
    first = noted_hash(model, notes)
    assert first == weights_hash(model)
    (note,) = notes.iterdir()
    atomic.write_json(note, {"of": str(model), "sha256": "what was noted"})
    assert noted_hash(model, notes) == "what was noted"
    os.utime(model / "model.safetensors")
    assert noted_hash(model, notes) == first and len(list(notes.iterdir())) == 2


def test_the_hash_of_files_that_change_while_they_are_read_is_not_noted(
    speaker_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, notes = tmp_path / "model", tmp_path / "notes"
    shutil.copytree(speaker_folder, model)

    def read_and_change(folder: Path) -> str:
        found = weights_hash(folder)
        os.utime(model / "model.safetensors")  # as by who writes it in place
        return found

    monkeypatch.setattr(weights, "weights_hash", read_and_change)
    with pytest.raises(OSError, match=f"files in {model} changed while they were read"):
        noted_hash(model, notes)
    assert not notes.exists()


def test_nor_is_a_merger_of_them_kept(speaker_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "model"
    shutil.copytree(speaker_folder, base)

    class Changed(Staging):
        def _make_room(self, what: str, needed_bytes: int, keep: str) -> None:
            os.utime(base / "model.safetensors")

    with pytest.raises(OSError, match=f"files in {base} changed while they were read"):
        Changed(node_folder(str(tmp_path / "local"), {})).merged(base, adapter_folder, "float32")
    assert not list((tmp_path / "local").rglob("*.safetensors"))


def in_a_job(ws: Workspace, name: str, out: Path, *asked: Mapping[str, Any], **environment: str) -> EndRecord:
    """Open engines in a process of their own, under the entry process of a job; how that ended."""
    body = (sys.executable, str(HERE / "opened_with.py"), str(out), *map(json.dumps, asked))
    return run_job(ws, name, body, environment)


def run_job(ws: Workspace, name: str, body: tuple[str, ...], environment: Mapping[str, str] | None = None) -> EndRecord:
    made = Spec(name, str(ws.root), 1, "sample", 4, "local", body, dict(environment or {}))
    made.save()
    command = [sys.executable, "-m", "hpc_rl.cluster.entry", str(made.path)]
    jobs_own = {**ENVIRONMENT, "HPC_RL_JOB_ID": name, "HPC_RL_RESTART": "0"}
    subprocess.run(command, cwd=HERE.parents[1], env=jobs_own, timeout=600, check=False, capture_output=True)
    (end,) = [end for end in end_records(ws, StageId(1, "sample")) if end.name == name]
    return end


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "run")
    atomic.write_json(made.config_path, {})
    return made


def test_an_engine_that_takes_too_much_takes_less_the_next_time_and_then_samples(
    ws: Workspace, speaker_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    sample = {
        "engine": "auto",
        "cpu_kv_cache_gib": 10_000.0,
        "stage_to": str(tmp_path / "local"),
        "merge_adapter": True,
    }
    asked = {
        "base": str(speaker_folder),
        "adapter": str(adapter_folder),
        "sample": sample,
        "cache_dir": str(ws.compile_cache),
    }
    out = tmp_path / "out.json"
    end = in_a_job(ws, "sample-a1", out, asked)
    assert end.outcome == "out of memory" and "requested memory for kv (10000.0 GiB)" in end.error
    assert notches_of(ws, 1, "sample") == 1
    assert len(list(ws.compile_cache.glob("*/slot_00/unsettled"))) == 1, "it did not get ready"
    for number in (2, 3, 4):  # half of a large machine is more than a test may take
        assert run_job(ws, f"sample-a{number}", (sys.executable, "-c", FAILING)).outcome == "out of memory"

    notches = notches_of(ws, 1, "sample")
    end = in_a_job(ws, "sample-a5", out, {**asked, "notches": notches})
    assert end.outcome == "done", end.error
    said = ws.resolve(end.log).read_text()
    assert "WARNING after running out of memory 4 times: cpu_kv_cache_gib" in said
    assert "instead of 10000.0, max_num_seqs 16 instead of null" in said
    (opened,) = json.loads(out.read_text())
    about = opened["description"]
    assert (about["engine"], about["asked"], about["notches"], about["max_num_seqs"]) == ("vllm", "auto", 4, 16)
    assert 0 < about["cpu_kv_cache_gib"] < 100 and about["load_strategy"] == "lazy"
    assert (about["staged_by"], about["tensor_parallel_size"]) == ("another process", 1)
    (slot,) = ws.compile_cache.glob("*/slot_00")
    assert about["compile_cache"] == str(slot) and (slot / "model").resolve() == Path(about["staged"])
    assert not list(ws.compile_cache.glob("*/slot_00/unsettled"))
    assert {"import", "merging", "engine"} == set(opened["loading"])
    other = open_and_sample({**asked, "cache_dir": None, "sample": {**sample, "engine": "transformers"}})
    assert opened["tokens"] == other["tokens"]


@pytest.mark.slow
def test_what_an_engine_in_processes_of_its_own_died_of_is_looked_for_in_the_log(
    ws: Workspace, speaker_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # as with tensor_parallel_size > 1
    asked = {"base": str(speaker_folder), "sample": {"engine": "auto", "cpu_kv_cache_gib": 10_000.0}}
    end = in_a_job(ws, "sample-a1", tmp_path / "out.json", asked, **apart)
    assert end.outcome == "out of memory"
    assert "EngineCoreFailed: the engine's processes did not start; why is in the log above" in end.error
    assert "no room with cpu_kv_cache_gib 10000: raise sample.cpu_kv_cache_gib, lower" in end.error


def test_what_vllm_cannot_open_is_an_error_or_is_sampled_with_transformers_by_auto(
    ws: Workspace, speaker_folder: Path, tmp_path: Path
) -> None:
    """An architecture that it does not know; a cache without room for one prompt. In one job, to import it once."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    folder, out = tmp_path / "new", tmp_path / "out.json"
    shutil.copytree(speaker_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen9VLForEverything"]}))
    unknown = [{"base": str(folder), "sample": {"engine": engine}} for engine in ("vllm", "auto")]
    no_room = {"base": str(speaker_folder), "sample": {"engine": "auto", "cpu_kv_cache_gib": 0.0001}}
    end = in_a_job(ws, "sample-a1", out, *unknown, no_room)

    by_vllm, by_auto = json.loads(out.read_text())
    assert by_vllm.keys() == {"failed"} and "Qwen9VLForEverything" in by_vllm["failed"]
    why = "vLLM: Model architectures ['Qwen9VLForEverything'] are not supported for now"
    assert (by_auto["description"]["engine"], by_auto["description"]["why"]) == ("transformers", why)
    said = ws.resolve(end.log).read_text()
    assert f"WARNING engine auto: sampling with transformers, which is slower. {why}" in said
    plain = open_and_sample({"base": str(speaker_folder), "sample": {"engine": "transformers"}})
    assert by_auto["tokens"] == plain["tokens"]

    assert end.outcome == "error", "less memory would not help"
    assert "the KV cache has no room with cpu_kv_cache_gib 0.0001: raise sample.cpu_kv_cache_gib, lower" in end.error
    assert notches_of(ws, 1, "sample") == 0
