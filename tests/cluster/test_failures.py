"""How ends are classified, and which two errors are one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl.cluster import memory_killer
from hpc_rl.cluster.failures import (
    Outcome,
    classify,
    fingerprint,
    has_no_room_for_cache,
    is_out_of_memory,
    last_error,
)

TRACEBACK = "Traceback (most recent call last):\n  File ...\nKeyError: 'speaker_problm'\n"
HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
)
GPU = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"
# the words of vLLM 0.31
GPU_TAKEN = (
    "ValueError: Free memory on device cuda:0 (31.2/79.2 GiB) on startup is less than desired GPU memory utilization "
    "(0.8, 63.36 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.\n"
)
CPU_CACHE = (
    "ValueError: Available memory on node 0 (17.3/23.5 GiB) on kv cache allocation is less than requested memory for kv"
    " (10000.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce …\n"
)
NO_BLOCKS = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when …\n"
SHORT_CACHE = (
    "ValueError: To serve at least one request with the model's max seq len (32768), (1.75 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.5 GiB). Try increasing `gpu_memory_utilization`\n"
)
WORKER_REPLACED = f"""worker 3: Traceback (most recent call last):
worker 3:   File "/venv/torch/nn/modules/module.py", line 1775, in _wrapped_call_impl
worker 3: {GPU.strip()}
2026-11-21 16:02:11,120 WARNING worker 3 of 8 on GPU 2 died after 300 s ({GPU.strip()}). It ran out of memory, so the \
next one takes less (notch 1 of 4). Another starts now
2026-11-21 16:02:52,007 INFO worker 3 of 8 on GPU 2 is ready after 41 s, 128 samples at once
"""
DISK_FULL = "Traceback (most recent call last):\n  File ...\nOSError: [Errno 28] No space left on device\n"
# an engine on two GPUs, as vLLM 0.31 prints it
ENGINE_PROCESSES = f"""(Worker_TP1 pid=71) ERROR 11-21 16:02:10 [multiproc_executor.py:932] {GPU.strip()}
(EngineCore pid=70) ERROR 11-21 16:02:11 [core.py:1214] EngineCore failed to start.
Process EngineCore:
Traceback (most recent call last):
  File "/venv/vllm/v1/engine/core.py", line 1214, in run_engine_core
RuntimeError: Worker failed with error 'x', please check the stack trace above for the root cause
"""
ENGINE_LOST = (
    "Traceback (most recent call last):\n  File ...\n"
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
)


def in_worker(log: str) -> str:
    return "".join(f"worker 1: {line}\n" for line in log.splitlines())


@pytest.mark.parametrize(
    ("code", "log", "asked", "outcome"),
    [
        (0, "", False, Outcome.DONE),
        (0, "", True, Outcome.DONE),
        (143, "", True, Outcome.LEFT),
        (-15, "", True, Outcome.LEFT),
        (75, "", True, Outcome.LEFT),
        (-9, "", True, Outcome.LEFT),
        (75, "round 1 grade is blocked", False, Outcome.BLOCKED),
        (-9, "", False, Outcome.KILLED),
        (137, "", False, Outcome.KILLED),
        (-15, "", False, Outcome.KILLED),
        (143, "", False, Outcome.KILLED),
        (124, "", False, Outcome.LEFT),
        (1, GPU, False, Outcome.OUT_OF_MEMORY),
        (1, GPU, True, Outcome.OUT_OF_MEMORY),
        (143, GPU, True, Outcome.LEFT),
        (75, GPU, True, Outcome.LEFT),
        (1, TRACEBACK, True, Outcome.LEFT),
        (1, "RuntimeError: CUDA error: out of memory", False, Outcome.OUT_OF_MEMORY),
        (1, f"RuntimeError: {HOST}", False, Outcome.OUT_OF_MEMORY),
        (1, GPU_TAKEN, False, Outcome.OUT_OF_MEMORY),
        (1, CPU_CACHE, False, Outcome.OUT_OF_MEMORY),
        (1, "MemoryError\n", False, Outcome.OUT_OF_MEMORY),
        (1, "[rank0]: MemoryError\n", False, Outcome.OUT_OF_MEMORY),
        (1, "NoMemoryErrorHere: x\n", False, Outcome.ERROR),
        (1, NO_BLOCKS, False, Outcome.ERROR),
        (1, SHORT_CACHE, False, Outcome.ERROR),
        (-9, GPU, False, Outcome.KILLED),
        (1, WORKER_REPLACED + DISK_FULL, False, Outcome.ERROR),
        (-11, WORKER_REPLACED, False, Outcome.ERROR),
        (-6, WORKER_REPLACED + "terminate called after throwing 'c10::OutOfMemoryError'", False, Outcome.OUT_OF_MEMORY),
        (1, TRACEBACK, False, Outcome.ERROR),
        (2, "usage: ...", False, Outcome.ERROR),
        (-11, "", False, Outcome.ERROR),
        (-6, "terminate called", False, Outcome.ERROR),
    ],
)
def test_the_class_of_an_end(code: int, log: str, asked: bool, outcome: Outcome) -> None:
    assert classify(code, log, asked) is outcome


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (TRACEBACK, "KeyError: 'speaker_problm'"),
        (TRACEBACK + "some library says goodbye\n\n", "KeyError: 'speaker_problm'"),
        (TRACEBACK + "\nDuring handling ...\n" + TRACEBACK.replace("Key", "Value"), "ValueError: 'speaker_problm'"),
        (GPU, GPU.strip()),
        ("[rank0]: KeyError: 'x'\nsome library says goodbye\n", "KeyError: 'x'"),
        (
            "hpc_rl.run.atomic.CorruptFile: x.json is not valid JSON\n",
            "hpc_rl.run.atomic.CorruptFile: x.json is not valid JSON",
        ),
        (
            TRACEBACK + "hpc_rl.services.trust.Untrusted: x is no file\nbye\n",
            "hpc_rl.services.trust.Untrusted: x is no file",
        ),
        (TRACEBACK + "a.b.Stop\n", "a.b.Stop"),
        (TRACEBACK + "see docs.example.Org, it says why\n", "KeyError: 'speaker_problm'"),
        ("error: no such file\n", "error: no such file"),
        ("", ""),
        ("\n\n  \n", ""),
        ("KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("ValueError: " + "x" * 1000, ("ValueError: " + "x" * 1000)[:500]),
    ],
)
def test_the_line_that_says_what_went_wrong(log: str, error: str) -> None:
    assert last_error(log) == error


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("KeyError: 17", "KeyError: 4"),
        ("at 0x7f3a00ff", "at 0x7f3a00fe"),
        ("shard_0003.1f2e3d4c5b6a.x", "shard_0012.ffeeddccbbaa.x"),
        ("Value Error", "value error"),
        ("run-r01-sample-a1-3f9c2d.json is gone", "run-r01-sample-a2-a00b1c.json is gone"),
    ],
)
def test_errors_that_differ_only_in_numbers_and_tokens_are_the_same(one: str, other: str) -> None:
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("KeyError: 'a'", "KeyError: 'b'"), ("ValueError: x", "TypeError: x"), ("no file faded", "no file decade")],
)
def test_errors_that_differ_in_words_are_not(one: str, other: str) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_too_little_memory_for_the_cache_is_told_from_too_much() -> None:
    assert has_no_room_for_cache(NO_BLOCKS) and has_no_room_for_cache(SHORT_CACHE)
    assert not has_no_room_for_cache(GPU_TAKEN) and not has_no_room_for_cache(CPU_CACHE)


@pytest.mark.parametrize(
    "said",
    [
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "torch.distributed.DistBackendError: NCCL error in: …\nLast error:\nCuda failure 2 'out of memory'",
        "OSError: [Errno 12] Cannot allocate memory",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 3.00 GiB for an array",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_other_words_for_too_little_memory(said: str) -> None:
    assert is_out_of_memory(said) and is_out_of_memory(TRACEBACK + "Traceback (most recent call last):\n" + said)


def test_of_a_log_only_the_error_that_it_ends_with_counts() -> None:
    out_of_memory = "Traceback (most recent call last):\n  File ...\n" + GPU
    assert not is_out_of_memory(out_of_memory + DISK_FULL)
    assert is_out_of_memory(NO_BLOCKS + out_of_memory), "an earlier word of the other kind hides nothing"
    during = "\nDuring handling of the above exception, another exception occurred:\n\n"
    assert is_out_of_memory(out_of_memory + during + TRACEBACK), "what was said on the way out is not the cause"
    assert is_out_of_memory(f"[rank0]: {GPU}".join(("[rank0]: Traceback (most recent call last):\n", "")))
    assert is_out_of_memory(out_of_memory + "Exception ignored in: <function Engine.__del__ at 0x7f>\n" + TRACEBACK)
    assert not is_out_of_memory(
        f"2026-11-21 16:02:11,120 WARNING the model failed at 64 items\n{out_of_memory}" + TRACEBACK
    )
    names_it = (
        "Traceback (most recent call last):\n  File ...\n    raise RuntimeError('CUDA out of memory')\nKeyError: 1\n"
    )
    assert not is_out_of_memory(names_it), "lines of source code name any error"


def test_an_error_that_refers_to_another_process_is_looked_up_there() -> None:
    assert is_out_of_memory(ENGINE_PROCESSES + ENGINE_LOST)
    assert not is_out_of_memory(ENGINE_PROCESSES.replace(GPU.strip(), NO_BLOCKS.strip()) + ENGINE_LOST)
    assert not is_out_of_memory(ENGINE_PROCESSES.replace(GPU.strip(), "KeyError: 1") + ENGINE_LOST)
    memory_error = ENGINE_PROCESSES.replace(GPU.strip(), "MemoryError")
    assert is_out_of_memory(memory_error + ENGINE_LOST)
    last_words = ENGINE_LOST.splitlines()[-1]
    lost = f"Traceback (most recent call last):\nhpc_rl.engines.pool.PoolFailed: all workers are lost: {last_words}\n"
    assert is_out_of_memory(in_worker(ENGINE_PROCESSES) + lost)
    assert not is_out_of_memory(in_worker(ENGINE_PROCESSES) + ENGINE_LOST), "that worker has been replaced"


def test_a_pool_without_workers_says_itself_that_they_ran_out_of_memory() -> None:
    said = f"hpc_rl.engines.pool.PoolFailed: all workers are lost: worker 1 of 1 on GPU 0: {GPU}"
    lost = f"Traceback (most recent call last):\n{said}"
    assert is_out_of_memory(WORKER_REPLACED + lost)
    assert not is_out_of_memory(WORKER_REPLACED + lost.replace(GPU, "RuntimeError: NCCL is broken\n"))


@pytest.mark.parametrize(
    ("groups", "file", "text", "kills"),
    [
        (
            "0::/slurm/job_7/step_0\n",
            "slurm/job_7/step_0/memory.events",
            "low 0\noom 3\noom_kill 2\noom_group_kill 1",
            2,
        ),
        ("1:cpu:/a\n4:memory:/slurm/job_7\n0::/\n", "memory/slurm/job_7/memory.oom_control", "oom_kill 1\n", 1),
        (
            "4:memory,hugetlb:/x\n",
            "memory/x/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\n",
            0,
        ),  # Linux < 4.13
        ("0::/elsewhere\n", "here/memory.events", "oom_kill 5\n", 0),
    ],
)
def test_the_kernels_memory_killer_leaves_a_count(
    tmp_path: Path, groups: str, file: str, text: str, kills: int
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    path = tmp_path / "sys" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert memory_killer.kills(tmp_path / "cgroup", tmp_path / "sys") == kills
