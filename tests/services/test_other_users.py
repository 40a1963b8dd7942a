"""Other users of the machine: they cannot read the token, and what they plant is not believed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.services import handoff
from hpc_rl.services.trust import Untrusted

from .every_service import Served, serve
from .other_user import NOBODY, as_nobody, open_folder

RECORD = "planted.json"


@pytest.fixture(params=[0o022, 0o000, 0o077], ids=["umask-022", "umask-000", "umask-077"])
def served(request: pytest.FixtureRequest, model: YesNoModel) -> Iterator[Served]:
    """A service in a folder that others may enter, started under a usual, an open and a closed umask."""
    before = os.umask(request.param)
    try:
        with open_folder() as folder, serve("reward_model", model, folder) as made:
            yield made
    finally:
        os.umask(before)


def folder_of(served: Served) -> Path:
    return served.root.parent / "services" / served.name


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def nonces(folder: Path, refused: list[str] | None = None) -> list[str]:
    """Of the servers that clients find."""
    return [endpoint.nonce for endpoint in handoff.discover(folder, [].append if refused is None else refused.append)]


def test_the_token_is_private_and_its_folder_is_closed_to_other_writers(served: Served) -> None:
    folder = folder_of(served)
    assert mode(folder / handoff.TOKEN_FILE) == 0o600
    assert not mode(folder) & (stat.S_IWGRP | stat.S_IWOTH)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".tmp")] == []
    assert not any(served.token in path.read_text() for path in folder.glob("*.json"))


def test_another_user_may_look_but_knows_no_token_and_can_plant_nothing(served: Served) -> None:
    folder = folder_of(served)
    readable = mode(folder) & stat.S_IXOTH
    (record,) = folder.glob("*.json")
    planted = record.read_text()

    def attack() -> None:
        for path in (folder / handoff.TOKEN_FILE, folder / "token.new"):
            with pytest.raises((PermissionError, FileNotFoundError)):
                path.read_bytes()
        with pytest.raises((PermissionError, Untrusted)):
            handoff.read_token(folder)
        for path in (folder / RECORD, folder / handoff.TOKEN_FILE, record):
            with pytest.raises(PermissionError):
                path.write_text(planted)
        with pytest.raises(PermissionError):
            record.unlink()
        with pytest.raises(PermissionError):
            record.rename(folder / RECORD)
        with pytest.raises(PermissionError):
            (folder / RECORD).symlink_to("/tmp")
        if readable:
            assert json.loads(record.read_text())["service"] == served.name

    as_nobody(attack)
    assert nonces(folder) == [served.hosted.publication.endpoint.nonce]


def test_records_are_as_readable_as_the_umask_says_and_others_write_to_none(served: Served) -> None:
    umask = os.umask(0)
    os.umask(umask)
    (record,) = folder_of(served).glob("*.json")
    assert mode(record) == 0o644 & ~umask
    record.chmod(0o664)
    refused: list[str] = []
    assert nonces(folder_of(served), refused) == [] and "others may have written to it" in refused[0]


def test_what_another_user_has_planted_is_not_believed(served: Served) -> None:
    """The folder was open when somebody wrote into it: his record, his token and his link are still his."""
    folder = folder_of(served)
    (record,) = folder.glob("*.json")
    content = json.dumps({**json.loads(record.read_text()), "nonce": "planted"})
    folder.chmod(0o777)
    folder.parent.chmod(0o755)

    def plant() -> None:
        (folder / RECORD).write_text(content)
        (folder / "link.json").symlink_to(RECORD)
        os.mkfifo(folder / "fifo.json")
        (folder / handoff.TOKEN_FILE).rename(folder / "stolen")
        (folder / handoff.TOKEN_FILE).write_text("known to nobody")
        (folder / handoff.TOKEN_FILE).chmod(0o600)

    as_nobody(plant)
    assert (folder / RECORD).stat().st_uid == NOBODY
    refused: list[str] = []
    assert nonces(folder, refused) == [served.hosted.publication.endpoint.nonce]
    assert len(refused) == 3 and any(f"belongs to user {NOBODY}" in reason for reason in refused)
    with pytest.raises(Untrusted, match="belongs to user"):
        handoff.run_token(folder)
    assert mode(folder) == 0o755  # closed again by whoever starts a service in it
