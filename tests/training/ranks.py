"""Programs for rank processes: `python -m tests.training.ranks NAME --workspace W --round R`. Not a test module."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from hpc_rl.orchestrate.job import parse_arguments
from tests.waiting import PATIENCE_S


def meet(folder: Path) -> int:
    """Find the others, talk, gather, part."""
    from hpc_rl.training.ranks.distributed import all_gather_objects, broadcast_object, process_group

    with process_group(folder, preflight_s=PATIENCE_S) as world:
        everyone = all_gather_objects({"rank": world.rank, "pid": os.getpid()})
        print("OTHERS MAY", *(oct(path.stat().st_mode & 0o077) for path in folder.glob("rendezvous-*")), flush=True)
        print("HEARD", [one["rank"] for one in everyone], broadcast_object(f"from {world.rank}"), flush=True)
        _gather_uneven(world.rank)
        _wait_for_rank_0(world.rank)
    return 0


def _wait_for_rank_0(rank: int) -> None:
    """Rank 0 works for longer than a collective may take, and then fails."""
    import torch
    import torch.distributed as dist

    from hpc_rl.training.ranks.distributed import rank_0_alone
    from hpc_rl.training.ranks.meeting import MeetingFailed

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    finished = 0.0
    with rank_0_alone("it sleeps"):
        if rank == 0:
            time.sleep(3)
            finished = time.time()
    left = time.time()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE_S))
    times = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
    dist.all_gather(times, torch.tensor([finished, left], dtype=torch.float64))
    print("WAITED", bool(times[1][1] >= times[0][0] > 0), flush=True)
    try:
        with rank_0_alone("it fails"):
            if rank == 0:
                raise OSError("disk full")
    except (OSError, MeetingFailed) as error:
        print("SAID", error, flush=True)


def _gather_uneven(rank: int) -> None:
    """Gather what TRL does, a number for each row and one for each rank, where rank 1 has only a filler."""
    import torch
    import torch.distributed as dist

    from hpc_rl.training.ranks.uneven import uneven_rows

    class Gathers:
        """What accelerate's Accelerator does on CPUs."""

        def gather(self, tensor: torch.Tensor) -> torch.Tensor:
            found = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(found, tensor)
            return torch.cat(found)

    accelerator = Gathers()
    with uneven_rows(accelerator, (2, 0)):
        of_rows = accelerator.gather(torch.tensor([[1.0, 2.0], [9.0]][rank]))
        of_ranks = accelerator.gather(torch.tensor([[5.0 + rank]]))
    print("GATHERED", of_rows.tolist(), of_ranks.flatten().tolist(), flush=True)
    print("AS BEFORE", accelerator.gather(torch.tensor([rank])).tolist(), flush=True)


def meet_two_nodes(folder: Path) -> int:
    """Four ranks of two nodes talk; where the folder has a file `stops`, rank 3 is frozen once all have met."""
    from hpc_rl.training.ranks import preflight
    from hpc_rl.training.ranks.distributed import get_world_info, process_group

    rank = get_world_info().rank
    os.environ["SLURMD_NODENAME"] = f"node{rank // 2 + 1}"
    stops, check = (folder / "stops").exists(), preflight.check

    def check_briefly(*args: Any) -> Any:
        if rank == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return check(*args[:-1], 3.0)

    if stops:
        preflight.check = check_briefly
    with process_group(folder, preflight_s=PATIENCE_S) as world:
        print(json.dumps(world.preflight), flush=True)
    return 0


def once_per_node(folder: Path, fails: bool) -> int:
    """Four ranks of two nodes, the first of each of which works, or fails at it on the second."""
    import torch.distributed as dist

    from hpc_rl.training.ranks import nodes
    from hpc_rl.training.ranks.distributed import get_world_info

    rank = get_world_info().rank
    socket.gethostname = lambda: f"node{rank // 2}"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    worked = []

    def work() -> str:
        worked.append(rank)
        if fails and rank == 2:
            raise ValueError("node1 has no room")
        return f"made by {rank}"

    try:
        said = nodes.once_per_node(rank, work)
    except ValueError as error:
        said = str(error)
    print(json.dumps([worked, said]), flush=True)
    dist.destroy_process_group()
    return 0


def hang(folder: Path) -> int:
    """Rank 0 waits in a collective for a rank that never comes to it."""
    from hpc_rl.training.ranks.distributed import broadcast_object, process_group
    from hpc_rl.training.ranks.leaving import Leaving

    with Leaving(grace_s=1.0), process_group(folder, preflight_s=PATIENCE_S) as world:
        print("TOGETHER", flush=True)
        if world.is_main:
            broadcast_object(None, source=1)
        time.sleep(600)
    return 0


def reward_live(folder: Path) -> int:
    """Ask a listener that refuses rank 0, and then have rank 0 write to a disk that is full."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from hpc_rl.config.lewis import LewisConfig
    from hpc_rl.data.lewis import GameRow
    from hpc_rl.run.workspace import Workspace
    from hpc_rl.services.client import ListenerClient
    from hpc_rl.training.algorithms.grpo_live import Asked, Game, LiveRewards
    from hpc_rl.training.lewis_game import Judge
    from hpc_rl.training.ranks.distributed import process_group
    from tests.training.conftest import PARTS

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, b'{"status": "ok", "nonce": "x"}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(401, b"{}")

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    rows = [GameRow("g", "a.png", ("b.png", "c.png"), ("A", "B"), "Describe.", "A", 0, "dogs", "dog")]
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        process_group(folder, preflight_s=PATIENCE_S) as world,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = {"url": f"http://127.0.0.1:{server.server_port}", "deadline_s": PATIENCE_S}
        sections = {"run": {"name": "t", "workspace": folder}, "speaker": {"path": "x"}, "listener": {"path": "x"}}
        services = {"listener": {"client": client}}
        config = LewisConfig.model_validate({**sections, "data": {"image_root": folder}, "services": services})
        with ListenerClient(Workspace(folder), config, token="of another run") as listener:
            judge = Judge(config, rows, listener, Path("/dev/full"), PARTS)
            rewards = LiveRewards(world, Game(["g"], ["Describe."], judge), PARTS, None)
            for text in ("a dog", ""):  # of no description nobody is asked
                try:
                    print("REWARDS", rewards([Asked(text, 0)], 0), flush=True)
                except (OSError, RuntimeError) as error:
                    print("RAISED", type(error).__name__, error, flush=True)
        server.shutdown()
    return 0


def killed_while_saving(argv: list[str]) -> int:
    """Train, but die as by `kill -9` when the second checkpoint is about to be declared whole."""
    from hpc_rl.training.checkpointing.checkpoints import Checkpoints
    from jobs import train

    seal, count = Checkpoints.seal, 0

    def dying_seal(self: Checkpoints, folder: Path, *more: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        seal(self, folder, *more)

    Checkpoints.seal = dying_seal  # type: ignore[method-assign]
    return train.main(argv)


if __name__ == "__main__":
    name, rest = sys.argv[1], sys.argv[2:]
    if name == "killed_while_saving":
        sys.exit(killed_while_saving(rest))
    programs = {
        "meet": meet, "meet_two_nodes": meet_two_nodes, "hang": hang, "reward_live": reward_live,
        "once_per_node_works": partial(once_per_node, fails=False),
        "once_per_node_fails": partial(once_per_node, fails=True),
    }  # fmt: skip
    sys.exit(programs[name](parse_arguments("train", rest).workspace))
