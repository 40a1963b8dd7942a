"""How ends are classified, and which two errors are one."""

from __future__ import annotations

import pytest

from hpc_rl.cluster.failures import Outcome, classify, fingerprint, last_error

TRACEBACK = "Traceback (most recent call last):\n  File ...\nKeyError: 'speaker_problm'\n"
GPU = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"


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
        (1, GPU, False, Outcome.GPU_MEMORY),
        (1, "RuntimeError: CUDA error: out of memory", False, Outcome.GPU_MEMORY),
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
        (
            "hpc_rl.run.atomic.CorruptFile: x.json is not valid JSON\n",
            "hpc_rl.run.atomic.CorruptFile: x.json is not valid JSON",
        ),
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
