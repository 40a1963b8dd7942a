"""The snapshot of the code that a run's jobs import: an edit while jobs wait in the queue changes nothing for them."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.closed import check_tree_closed
from hpc_rl.run.workspace import Workspace

PACKAGES = ("hpc_rl", "jobs")


def source_root() -> Path:
    """The folder that holds this code's packages."""
    return Path(__file__).resolve().parents[2]


def _files(packages: Sequence[Path]) -> list[tuple[str, Path]]:
    return [
        (str(path.relative_to(package.parent)), path)
        for package in packages
        for path in sorted(package.rglob("*.py"))
        if "__pycache__" not in path.parts
    ]


def snapshot(ws: Workspace, extra: Sequence[Path] = ()) -> Path:
    """Copy the packages' sources to `code/<hash>/` unless they are there; returns that folder.

    Others may read it as the umask says, and not write to it whatever the umask says.

    Parameters
    ----------
    extra
        Further package folders, such as that of a recipe of the user's own.

    Raises
    ------
    NotClosed
        When others may write to a snapshot that is there.
    CorruptFile
        When what is there is not what its name says.
    """
    files = _files([*(source_root() / name for name in PACKAGES), *extra])
    digest = hashlib.sha256()
    contents = [(name, path.read_bytes()) for name, path in files]
    for name, content in contents:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    target = ws.code_dir / digest.hexdigest()[:12]
    if target.is_dir():
        _check(ws, target, contents)
        return target
    ws.root.mkdir(mode=0o755, parents=True, exist_ok=True)
    ws.code_dir.mkdir(mode=0o755, exist_ok=True)
    temporary = ws.code_dir / f".tmp-{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    for folder in sorted({temporary / around for name, _ in contents for around in Path(name).parents}):
        folder.mkdir(mode=0o755)
    for name, content in contents:
        (temporary / name).touch(mode=0o644, exist_ok=False)
        (temporary / name).write_bytes(content)
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(temporary)  # another launch was faster with the same code
    _check(ws, target, contents)
    return target


def _check(ws: Workspace, snapshot: Path, contents: Sequence[tuple[str, bytes]]) -> None:
    check_tree_closed(ws.root, snapshot)
    for name, content in contents:
        if not (snapshot / name).is_file() or (snapshot / name).read_bytes() != content:
            raise CorruptFile(f"{snapshot / name} is not the code that its folder's name stands for: remove {snapshot}")
