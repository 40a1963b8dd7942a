"""How ends are classified, and which two errors are one."""

from __future__ import annotations

import pytest

from hpc_rl.cluster.failures import Outcome, classify, fingerprint, has_no_room_for_cache, last_error

TRACEBACK = "Traceback (most recent call last):\n  File ...\nKeyError: 'speaker_problm'\n"
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
        (1, "RuntimeError: CUDA error: out of memory", False, Outcome.OUT_OF_MEMORY),
        (1, GPU_TAKEN, False, Outcome.OUT_OF_MEMORY),
        (1, CPU_CACHE, False, Outcome.OUT_OF_MEMORY),
        (1, "MemoryError\n", False, Outcome.OUT_OF_MEMORY),
        (1, "[rank0]: MemoryError\n", False, Outcome.OUT_OF_MEMORY),
        (1, "NoMemoryErrorHere: x\n", False, Outcome.ERROR),
        (1, NO_BLOCKS, False, Outcome.ERROR),
        (1, SHORT_CACHE, False, Outcome.ERROR),
        (-9, GPU, False, Outcome.KILLED),
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
