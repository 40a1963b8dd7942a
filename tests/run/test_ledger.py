"""The ledger keeps what was written whatever happens next, and folds into attempts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpc_rl.run.ledger import Attempt, History, Ledger
from hpc_rl.run.workspace import Workspace


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Workspace(tmp_path / "run"))


def intend(
    ledger: Ledger, name: str = "n1", stage: str = "sample", number: int = 1, after: tuple[str, ...] = ()
) -> None:
    ledger.append("intent", name=name, round=1, stage=stage, number=number, executor="slurm", depends_on=list(after))


def only(history: History) -> Attempt:
    assert len(history.attempts) == 1
    return history.attempts[0]


def test_there_is_no_history_without_a_ledger(ledger: Ledger) -> None:
    assert ledger.history() == History()
    assert not ledger.path.exists()


def test_an_intent_has_no_job_ids_until_the_answer_is_written(ledger: Ledger) -> None:
    intend(ledger, after=("n0",))
    attempt = only(ledger.history())
    assert (attempt.job_ids, attempt.depends_on, attempt.written_off) == (None, ("n0",), False)
    ledger.append("submitted", name="n1", job_ids=["7"])
    assert only(ledger.history()).job_ids == ("7",)


def test_an_array_of_several_submissions_gathers_its_ids(ledger: Ledger) -> None:
    intend(ledger)
    for job_id in ("7", "8"):
        ledger.append("submitted", name="n1", job_ids=[job_id])
    assert only(ledger.history()).job_ids == ("7", "8")


def test_a_job_adopted_from_the_queue_is_counted_once(ledger: Ledger) -> None:
    intend(ledger)
    ledger.append("submitted", name="n1", job_ids=["7"], adopted=True)
    ledger.append("submitted", name="n1", job_ids=["7"])
    assert only(ledger.history()).job_ids == ("7",)


def test_attempts_are_found_by_stage_oldest_first(ledger: Ledger) -> None:
    intend(ledger, "n1", "sample", 1)
    intend(ledger, "n2", "grade", 1)
    intend(ledger, "n3", "sample", 2)
    assert [a.name for a in ledger.history().of(1, "sample")] == ["n1", "n3"]
    assert ledger.history().of(2, "sample") == ()


def test_written_off_and_cancelled_attempts_say_so(ledger: Ledger) -> None:
    intend(ledger, "n1")
    intend(ledger, "n2")
    ledger.append("written_off", name="n1")
    ledger.append("cancelled", name="n2", why="its work is done")
    first, second = ledger.history().attempts
    assert (first.written_off, second.cancelled) == (True, "its work is done")


def test_a_run_is_paused_or_stopped_until_it_is_resumed(ledger: Ledger) -> None:
    ledger.append("paused", why="cancelled by the user")
    ledger.append("stopped", why="the same error twice")
    history = ledger.history()
    assert (history.paused, history.stopped) == ("cancelled by the user", "the same error twice")
    ledger.append("resumed")
    history = ledger.history()
    assert (history.paused, history.stopped) == ("", "")
    intend(ledger)
    assert only(ledger.history()).time >= history.resumed_at > 0


def test_what_was_given_up_says_why_until_it_is_tried_again(ledger: Ledger) -> None:
    intent = {"name": "a", "round": 3, "stage": "train", "number": 1, "executor": "slurm", "depends_on": []}
    ledger.append("intent", **intent)
    ledger.append("given_up", round=3, stage="train", why="it failed")
    ledger.append("resumed")
    assert ledger.history().given_up == {(3, "train"): "it failed"}
    ledger.append("intent", **{**intent, "name": "b", "number": 2})
    assert ledger.history().given_up == {}


def test_a_last_line_cut_off_anywhere_costs_that_line_only(ledger: Ledger) -> None:
    intend(ledger, "n1")
    whole = ledger.path.read_bytes()
    intend(ledger, "n2 with an ä")
    both = ledger.path.read_bytes()
    for length in range(len(whole), len(both)):
        ledger.path.write_bytes(both[:length])
        before = [a.name for a in ledger.history().attempts]
        assert before == ["n1"] or length == len(both) - 1
        intend(ledger, "n3")
        history = ledger.history()
        assert [a.name for a in history.attempts] == [*before, "n3"]
        assert history.skipped_lines == (0 if length in (len(whole), len(both) - 1) else 1)


def test_lines_that_are_no_objects_are_skipped_and_counted(ledger: Ledger) -> None:
    intend(ledger)
    with ledger.path.open("ab") as file:
        file.write(b"[1, 2]\n\n\xff\xfe\n")
    assert ledger.history().skipped_lines == 2
    assert only(ledger.history()).name == "n1"


def test_events_of_later_versions_are_passed_over(ledger: Ledger) -> None:
    intend(ledger)
    ledger.append("promoted", name="n1", to="a better place")
    assert only(ledger.history()).name == "n1"


@example("a line separator \u2028 and \x85")
@given(st.text())
def test_any_reason_is_remembered_as_it_was(tmp_path_factory: pytest.TempPathFactory, why: str) -> None:
    ledger = Ledger(Workspace(tmp_path_factory.mktemp("run")))
    ledger.append("stopped", why=why)
    history = ledger.history()
    assert (history.stopped, history.skipped_lines) == (why, 0)


def test_the_ledger_is_readable_by_the_group_where_the_umask_says_so(ledger: Ledger) -> None:
    intend(ledger)
    assert ledger.path.stat().st_mode & 0o444 == 0o444
