"""What tests of pools ask, what one engine makes of it, and which processes a pool has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpc_rl.engines.base import Completion, Prompt, Request, Sampling, generate
from hpc_rl.engines.pool import EnginePool

from .letters import LettersEngine

SAMPLING = Sampling(1.0, 20)
Open = Callable[..., EnginePool]


def requests(groups: int = 10, size: int = 4, text: str = "prompt") -> list[Request]:
    prompts = [Prompt.of(f"{text} {group}") for group in range(groups)]
    return [Request(prompt, 100 * group + number) for group, prompt in enumerate(prompts) for number in range(size)]


def submit(pool: EnginePool, asked: list[Request], sampling: Sampling = SAMPLING) -> None:
    for place, request in enumerate(asked):
        pool.submit(str(place), request, sampling)


def finish(pool: EnginePool) -> dict[str, Completion]:
    """All that is unfinished; none comes twice."""
    found: dict[str, Completion] = {}
    while pool.unfinished:
        made = pool.step()
        assert not found.keys() & {key for key, _ in made}
        found |= dict(made)
    return found


def alone(asked: list[Request], sampling: Sampling = SAMPLING) -> dict[str, Completion]:
    """What one engine makes of the same."""
    made = generate(LettersEngine(4, 0.0, None), asked, sampling)
    return {str(place): completion for place, completion in enumerate(made)}


def processes(folder: Path, program: str = "") -> list[int]:
    """Running processes that have their temporary files beneath `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes().decode()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"TMPDIR={folder}".encode() in environment and state != "Z" and program in command:
            found.append(int(process.name))
    return found


def workers_of(temporary: Path) -> list[int]:
    return processes(temporary, "hpc_rl.engines.pool_worker")


def guards_of(temporary: Path) -> list[int]:
    return processes(temporary, "hpc_rl.engines.pool_guard")
