"""The handoff: records that appear whole, follow the job that owns them, and a token that is drawn once."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import stat
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from hpc_rl.run import atomic
from hpc_rl.services import handoff, hosting
from hpc_rl.services.records import MISSED_BEATS, Watch
from hpc_rl.services.trust import Untrusted
from tests.waiting import PATIENCE_S, wait_for

from .conftest import Lab


def publish(folder: Path, replica: str = "job-7", port: int = 4711, **more: object) -> handoff.Publication:
    options = {"heartbeat_s": 60.0, **more}
    return handoff.publish(folder, "listener", replica, "node3", port, **options)  # type: ignore[arg-type]


def test_a_published_server_is_discovered_until_it_leaves(tmp_path: Path) -> None:
    assert handoff.discover(tmp_path / "services" / "listener") == []
    publication = publish(tmp_path, job_id="7", restart=2, weights_hash="abc")
    (found,) = handoff.discover(tmp_path)
    assert found == publication.endpoint
    assert (found.url, found.job_id, found.restart, found.weights_hash) == ("http://node3:4711", "7", 2, "abc")
    publication.unpublish()
    assert handoff.discover(tmp_path) == []


def test_a_draining_server_is_not_offered(tmp_path: Path) -> None:
    publication = publish(tmp_path)
    publication.drain()
    assert handoff.discover(tmp_path) == []
    assert json.loads(publication.path.read_text())["state"] == "draining"
    publication.unpublish()


def test_the_heartbeat_renews_the_record_and_brings_it_back_when_it_is_lost(tmp_path: Path) -> None:
    publication = publish(tmp_path, heartbeat_s=0.02)
    first = publication.endpoint.heartbeat
    publication.path.unlink()
    (found,) = wait_for(lambda: handoff.discover(tmp_path), "the next beat")
    assert found.heartbeat > first
    publication.unpublish()
    time.sleep(0.1)
    assert handoff.discover(tmp_path) == []


def test_a_server_leaves_though_the_file_system_hangs(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hosted = lab.serve(heartbeat_s=0.02)
    hangs, goes_on, write = threading.Event(), threading.Event(), atomic.write_json

    def write_late(*given: object, **more: object) -> None:
        hangs.set()
        goes_on.wait(2 * PATIENCE_S)
        write(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(hosting, "FILE_PATIENCE_S", 0.1)
    monkeypatch.setattr(atomic, "write_json", write_late)
    assert hangs.wait(PATIENCE_S)
    leaving = threading.Thread(target=hosted.leave, args=[0.0], daemon=True)
    leaving.start()
    leaving.join(PATIENCE_S)
    assert not leaving.is_alive() and not hosted.server.alive
    assert "cannot take its record away: the file system does not answer" in caplog.text
    goes_on.set()  # what was begun is finished, in the right order
    wait_for(lambda: not hosted.publication.path.exists(), "the end of its record")


def test_a_requeued_job_takes_the_record_of_its_former_start_away(tmp_path: Path) -> None:
    bystander = publish(tmp_path, "job-8")
    frozen = publish(tmp_path, restart=0, heartbeat_s=60)
    new = publish(tmp_path, restart=1, port=4712)
    assert [(e.replica, e.restart, e.port) for e in handoff.discover(tmp_path)] == [
        ("job-7", 1, 4712),
        ("job-8", 0, 4711),
    ]
    frozen.drain()  # it wakes up: what it writes and removes is its own
    assert new.endpoint in handoff.discover(tmp_path)
    frozen.unpublish()
    assert [e.nonce for e in handoff.discover(tmp_path)] == [new.endpoint.nonce, bystander.endpoint.nonce]
    new.unpublish()
    bystander.unpublish()


def test_corrupt_records_are_named_and_cost_the_others_nothing(tmp_path: Path) -> None:
    good = publish(tmp_path, "good")
    record = json.loads(good.path.read_text())
    corrupt = {
        "cut": '{"service": "listener"',
        "incomplete": '{"service": "listener"}',
        "list": "[]",
        "types": json.dumps({**record, "heartbeat_s": "soon", "port": None}),
    }
    for name, content in corrupt.items():
        (tmp_path / f"{name}.json").write_text(content)
    refused: list[str] = []
    assert handoff.discover(tmp_path, refused.append) == [good.endpoint]
    assert sorted(refused) == sorted(f"{tmp_path / name}.json is no handoff record" for name in corrupt)
    good.unpublish()


def replicas(folder: Path) -> list[str]:
    return [endpoint.replica for endpoint in handoff.discover(folder)]


def test_records_that_are_not_renewed_are_swept_whatever_the_clocks_say(tmp_path: Path) -> None:
    """Clocks are an hour apart in both directions: neither saves a dead server nor removes a living one."""
    dead, frozen = publish(tmp_path, "dead"), publish(tmp_path, "frozen")
    for publication in (dead, frozen):
        publication._stop.set()
        record = json.loads(publication.path.read_text()) | {"heartbeat_s": 0.0}  # so that the test need not wait
        publication.path.write_text(json.dumps(record))
    (tmp_path / "ahead-0.json").write_text(json.dumps(record | {"replica": "ahead", "heartbeat": time.time() + 3600}))
    (tmp_path / "garbage.json").write_text("{")
    clocks = {"fast": time.time() + 3600, "slow": time.time() - 3600}
    watch = Watch(tmp_path, "own.json", heartbeat_s=0.0, lag_s=0.0)
    for beat in range(3 * MISSED_BEATS):
        for replica, clock in clocks.items():
            renewed = record | {"replica": replica, "heartbeat": clock + beat}
            atomic.write_json(tmp_path / f"{replica}-0.json", renewed)
        watch.look()
    assert replicas(tmp_path) == ["fast", "slow"] and not (tmp_path / "garbage.json").exists()
    frozen._write(frozen.endpoint)  # it wakes up
    assert "frozen" in replicas(tmp_path)


def test_a_server_that_is_published_sweeps_the_records_of_others(tmp_path: Path) -> None:
    dead = publish(tmp_path, "dead", heartbeat_s=0.01)
    dead._stop.set()
    watching = publish(tmp_path, "watching", heartbeat_s=0.01, lag_s=0.0)
    wait_for(lambda: replicas(tmp_path) == ["watching"], "the end of the dead one's record")
    watching.unpublish()


def test_a_record_is_old_only_after_many_looks_and_many_of_its_own_beats(tmp_path: Path) -> None:
    """A watcher that was frozen itself, or a record that is renewed more rarely than ours, is no reason to sweep."""
    slow = publish(tmp_path, "slow", heartbeat_s=60.0)
    watch = Watch(tmp_path, "own.json", heartbeat_s=0.0, lag_s=0.0)
    for _ in range(5 * MISSED_BEATS):
        watch.look()
    assert slow.path.exists(), "it has not missed a beat of its own"
    slow.path.write_text(json.dumps(asdict(slow.endpoint) | {"heartbeat_s": 0.0}))
    watch = Watch(tmp_path, "own.json", heartbeat_s=0.0, lag_s=0.0)
    for _ in range(MISSED_BEATS):
        watch.look()
        assert slow.path.exists(), "as many looks have not been taken yet"
    watch.look()
    assert not slow.path.exists()
    slow._stop.set()


def test_a_server_leaves_even_where_its_record_cannot_be_changed(tmp_path: Path) -> None:
    folder = tmp_path / "services"
    publication = publish(folder)
    publication.path.unlink()
    folder.rmdir()
    folder.write_text("no folder any more, so nothing can be written")
    publication.drain()
    publication.unpublish()


def _draw(folder: str, queue: multiprocessing.Queue[str]) -> None:
    queue.put(handoff.run_token(Path(folder)))


def test_of_many_servers_that_start_at_once_all_get_the_same_private_token(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_draw, args=(str(tmp_path), queue)) for _ in range(8)]
    for process in processes:
        process.start()
    tokens = {queue.get(timeout=PATIENCE_S) for _ in processes}
    for process in processes:
        process.join()
    assert len(tokens) == 1 and tokens == {handoff.read_token(tmp_path)}
    assert len(tokens.pop()) >= 32
    assert stat.S_IMODE((tmp_path / handoff.TOKEN_FILE).stat().st_mode) == 0o600


def test_an_empty_token_is_an_error_and_not_a_password(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / handoff.TOKEN_FILE, "\n", private=True)
    with pytest.raises(atomic.CorruptFile, match="empty"):
        handoff.run_token(tmp_path)


def test_a_service_folder_is_closed_to_other_writers_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o002)
    try:
        open_before = tmp_path / "old"
        open_before.mkdir()
        made = tmp_path / "services" / "listener"
        handoff.run_token(made)
        publication = publish(open_before)
    finally:
        os.umask(old)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (made, open_before)] == [0o755, 0o755]
    publication.unpublish()


@pytest.mark.parametrize("mode", [0o640, 0o644, 0o660])
def test_a_token_that_others_may_know_is_refused(tmp_path: Path, mode: int) -> None:
    handoff.run_token(tmp_path)
    (tmp_path / handoff.TOKEN_FILE).chmod(mode)
    for ask in (handoff.run_token, handoff.read_token):
        with pytest.raises(Untrusted, match=rf"token has mode {mode:04o} instead of 0600.*remove it"):
            ask(tmp_path)


def test_a_token_that_is_a_link_or_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    handoff.run_token(tmp_path / "mine")
    for name in ("link", "pipe", "dangling"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / handoff.TOKEN_FILE).symlink_to(tmp_path / "mine" / handoff.TOKEN_FILE)
    (tmp_path / "dangling" / handoff.TOKEN_FILE).symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe" / handoff.TOKEN_FILE, 0o600)
    for name in ("link", "pipe", "dangling"):
        with pytest.raises(Untrusted, match=f"{name}/token"):
            handoff.run_token(tmp_path / name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_what_another_user_planted_is_not_believed(tmp_path: Path) -> None:
    mine, planted = publish(tmp_path, "mine"), publish(tmp_path, "planted", port=666)
    os.chown(planted.path, 4242, -1)
    refused: list[str] = []
    assert [e.replica for e in handoff.discover(tmp_path, refused.append)] == ["mine"]
    assert len(refused) == 1 and f"{planted.path} belongs to user 4242, not to 0" in refused[0]
    handoff.run_token(tmp_path)
    os.chown(tmp_path / handoff.TOKEN_FILE, 4242, -1)
    for ask in (handoff.run_token, handoff.read_token):
        with pytest.raises(Untrusted, match="belongs to user 4242"):
            ask(tmp_path)
    os.chown(mine.path, 4242, -1)
    mine.drain()  # what was planted in place of our record is replaced
    assert mine.path.stat().st_uid == 0 and json.loads(mine.path.read_text())["state"] == "draining"
    mine.unpublish()
    planted.unpublish()


def test_a_requeued_job_keeps_its_replica_name() -> None:
    assert handoff.replica_name({"HPC_RL_JOB_ID": "12_3"}) == "job-12_3"
    assert handoff.replica_name({}) == f"{socket.gethostname()}-{os.getpid()}"


def test_readers_never_see_half_a_record(tmp_path: Path) -> None:
    publication = publish(tmp_path, heartbeat_s=0.001)
    corrupt: list[str] = []
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert len(handoff.discover(tmp_path, corrupt.append)) == 1
    publication.unpublish()
    assert not corrupt
