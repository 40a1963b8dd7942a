"""The handoff: records that appear whole, follow the job that owns them, and a token that is drawn once."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import stat
import time
from pathlib import Path

import pytest

from hpc_rl.run import atomic
from hpc_rl.services import handoff
from hpc_rl.services.trust import Untrusted


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
    deadline = time.monotonic() + 5
    while not handoff.discover(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert handoff.discover(tmp_path)[0].heartbeat > first
    publication.unpublish()
    time.sleep(0.1)
    assert handoff.discover(tmp_path) == []


def test_an_old_server_leaves_the_record_of_its_requeued_successor_alone(tmp_path: Path) -> None:
    old = publish(tmp_path, heartbeat_s=0.02)
    new = publish(tmp_path, restart=1, port=4712)
    time.sleep(0.1)
    old.drain()
    old.unpublish()
    assert [(e.nonce, e.port) for e in handoff.discover(tmp_path)] == [(new.endpoint.nonce, 4712)]
    new.unpublish()


def test_the_youngest_heartbeat_comes_first_and_corrupt_records_are_named(tmp_path: Path) -> None:
    a, b = publish(tmp_path, "a"), publish(tmp_path, "b")
    (tmp_path / "c.json").write_text('{"service": "listener"')
    (tmp_path / "d.json").write_text('{"service": "listener"}')
    corrupt: list[str] = []
    assert [e.replica for e in handoff.discover(tmp_path, corrupt.append)] == ["b", "a"]
    assert corrupt == [f"{tmp_path / name} is no handoff record" for name in ("c.json", "d.json")]
    a.unpublish()
    b.unpublish()


def _draw(folder: str, queue: multiprocessing.Queue[str]) -> None:
    queue.put(handoff.run_token(Path(folder)))


def test_of_many_servers_that_start_at_once_all_get_the_same_private_token(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_draw, args=(str(tmp_path), queue)) for _ in range(8)]
    for process in processes:
        process.start()
    tokens = {queue.get(timeout=30) for _ in processes}
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
    mine.drain()  # a planted record does not pass for a newer one of ours
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
