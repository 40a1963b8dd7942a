"""A pool of real worker processes: it samples as one engine does, whoever is killed, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_rl.cluster.failures import is_out_of_memory
from hpc_rl.engines.base import Completion, Prompt, Request, Sampling, generate
from hpc_rl.engines.pool import PoisonedRequest, PoolFailed, RequestRefused
from hpc_rl.engines.pool_process import PORTS, free_ports, worker_environment
from tests.waiting import wait_for

from .letters import LettersEngine, OpenLetters
from .pools import SAMPLING, Open, alone, finish, guards_of, processes, requests, submit, workers_of


def test_a_pool_samples_what_one_engine_does(open_pool: Open) -> None:
    pool = open_pool(OpenLetters(capacity=3), 3)
    assert pool.capacity == 9
    for asked in (requests(), requests(3, 2, "others")):
        assert generate(pool, asked, SAMPLING) == list(alone(asked).values())
    assert pool.step() == [] and pool.unfinished == 0
    assert sum(worker.completions for worker in pool.workers) == 46
    assert pool.description["engine"] == "letters" and pool.loading["engine"] == 0.25


def test_all_workers_work_and_completions_come_as_they_finish(open_pool: Open) -> None:
    pool = open_pool(OpenLetters(pause_s=0.005))
    pool.wait_until_all_are_ready()
    asked = requests()
    submit(pool, asked, Sampling(1.0, 40))
    order = []
    while pool.unfinished:
        order += [key for key, _ in pool.step()]
    assert sorted(order) == sorted(str(place) for place in range(40)) and order != sorted(order, key=int)
    for worker in pool.workers:
        assert worker.completions > 8 and worker.tokens > worker.completions
        assert 0 < worker.busy_s <= worker.up_s and worker.deaths == 0
    told = pool.description["workers"]
    assert [one["tokens"] for one in told] == [worker.tokens for worker in pool.workers]  # type: ignore[attr-defined]


def test_a_group_goes_to_one_worker_and_its_prompt_travels_once(open_pool: Open, tmp_path: Path) -> None:
    pool = open_pool(OpenLetters(notes=tmp_path))
    pool.wait_until_all_are_ready()
    submit(pool, requests(groups=16, size=8))
    finish(pool)
    notes = [file.read_text().splitlines() for file in tmp_path.iterdir() if file.name.isdigit()]
    assert len(notes) == 2 and sum(map(len, notes)) == 128
    objects = {line for lines in notes for line in set(lines)}  # an object, where it lies, and its text
    split = len(objects) - 16
    # shared when a worker would have had nothing to do: the first one, where it does not fit, and the last two
    assert split <= 3


def test_a_killed_worker_is_replaced_and_every_request_is_answered_once(
    open_pool: Open, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = open_pool(OpenLetters(pause_s=0.005))
    pool.wait_until_all_are_ready()
    asked = requests(40)
    submit(pool, asked)
    found = dict(pool.step())
    os.kill(workers_of(temporary)[0], signal.SIGKILL)
    found |= finish(pool)
    assert found == alone(asked)
    (dead,) = [worker for worker in pool.workers if worker.deaths]
    assert dead.deaths == 1 and dead.returned > 0 and "SIGKILL" in dead.last_error
    assert "died after" in caplog.text and "wait for another" in caplog.text
    pool.wait_until_all_are_ready()
    assert generate(pool, asked, SAMPLING) == list(alone(asked).values())
    assert len(workers_of(temporary)) == 2


def test_killing_a_guard_kills_its_worker_and_both_are_replaced(open_pool: Open, temporary: Path) -> None:
    pool = open_pool(OpenLetters(pause_s=0.005))
    pool.wait_until_all_are_ready()
    before = workers_of(temporary)
    asked = requests(40)
    submit(pool, asked)
    os.kill(guards_of(temporary)[0], signal.SIGKILL)
    assert finish(pool) == alone(asked)
    wait_for(lambda: len(set(before) & set(workers_of(temporary))) == 1, "its worker is gone")


def test_workers_may_die_all_the_time(open_pool: Open, temporary: Path) -> None:
    pool = open_pool(OpenLetters(pause_s=0.002), 3)
    asked = requests(100)
    submit(pool, asked)
    found: dict[str, Completion] = {}
    killed = 0
    while pool.unfinished:
        made = pool.step()
        assert not found.keys() & {key for key, _ in made}
        found |= dict(made)
        if len(found) > 60 * (killed + 1) and (running := workers_of(temporary)):
            os.kill(running[killed % len(running)], signal.SIGKILL)
            killed += 1
    assert found == alone(asked) and killed >= 4
    assert sum(worker.deaths for worker in pool.workers) >= killed - 1  # the last one may not have been noticed


def test_an_engine_that_fails_is_opened_anew_elsewhere(open_pool: Open, caplog: pytest.LogCaptureFixture) -> None:
    pool = open_pool()
    pool.submit("bad", Request(Prompt.of("raise"), 0), SAMPLING)
    with pytest.raises(PoisonedRequest, match=r"bad: 3 workers died .* an illegal memory access was encountered"):
        finish(pool)
    assert "RuntimeError: CUDA error: an illegal memory access" in caplog.text
    asked = requests()
    assert generate(pool, asked, SAMPLING) == list(alone(asked).values())


def test_a_request_that_kills_its_workers_is_named_and_all_others_are_answered(open_pool: Open) -> None:
    pool = open_pool(OpenLetters(capacity=4), 2)
    asked = requests(12)
    submit(pool, asked[:24])
    pool.submit("bad", Request(Prompt.of("kill"), 0), SAMPLING)
    for place, request in enumerate(asked[24:], 24):
        pool.submit(str(place), request, SAMPLING)
    found: dict[str, Completion] = {}
    named = []
    while pool.unfinished:
        try:
            found |= dict(pool.step())
        except PoisonedRequest as error:
            named.append(error)
    assert found == alone(asked)
    assert [error.key for error in named] == ["bad"] and "SIGKILL" in str(named[0])


def test_when_all_workers_are_hopeless_their_last_errors_are_said(open_pool: Open) -> None:
    with pytest.raises(PoolFailed, match=r"worker 1 of 2 on GPU 0: RuntimeError: NCCL is broken; worker 2 of 2"):
        open_pool(OpenLetters(crash="NCCL is broken"))


def test_a_pool_that_loses_all_workers_says_so_in_the_middle(open_pool: Open, tmp_path: Path) -> None:
    pool = open_pool(OpenLetters(crash="no GPU", once=tmp_path / "first"), 1)
    assert pool.workers[0].deaths == 1  # and the second try went well
    (tmp_path / "first").unlink()
    lost = open_pool(OpenLetters(notes=tmp_path), 1, pauses_s=())
    lost.submit("a", Request(Prompt.of("kill"), 0), SAMPLING)
    with pytest.raises(PoolFailed, match="worker 1 of 1 on GPU 0: killed by SIGKILL"):
        finish(lost)


def test_a_fault_of_the_users_is_not_tried_again(open_pool: Open, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="/models/x is no model folder") as error:
        open_pool(OpenLetters(fault="/models/x is no model folder"))
    assert not isinstance(error.value, PoolFailed)
    assert caplog.text.count("died") == 2


def test_after_running_out_of_memory_a_worker_takes_less(open_pool: Open, caplog: pytest.LogCaptureFixture) -> None:
    pool = open_pool(OpenLetters(needs=3), 2, notches=1)
    pool.wait_until_all_are_ready()
    assert [worker.notches for worker in pool.workers] == [3, 3]
    assert [one["notches"] for one in pool.description["workers"]] == [3, 3]  # type: ignore[attr-defined]
    assert "CUDA out of memory" in caplog.text and "takes less (notch 3 of 4)" in caplog.text
    with pytest.raises(PoolFailed) as error:
        open_pool(OpenLetters(needs=3), 2, most_notches=2)
    assert is_out_of_memory(str(error.value))  # so the job's end is known as one


def test_a_port_that_somebody_took_costs_no_pause(open_pool: Open, tmp_path: Path) -> None:
    opener = OpenLetters(crash="[Errno 98] Address already in use", once=tmp_path / "first")
    pool = open_pool(opener, 1, pauses_s=(1000.0,))
    assert pool.workers[0].deaths == 1


def test_workers_have_ports_of_their_own() -> None:
    taken: list[int] = []
    for number in range(50):
        taken.append(free_ports(taken, None, number))
    assert len({port // PORTS for port in taken}) == 50 and max(taken) + PORTS <= 32768
    assert [free_ports(taken, 29500, number) for number in range(3)] == [29500, 29500 + PORTS, 29500 + 2 * PORTS]


def test_workers_see_their_own_gpus_and_ports_and_share_the_processors(
    open_pool: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pool = open_pool(count=2, gpus=[("GPU-aa", "GPU-bb"), ("GPU-cc", "GPU-dd")])
    pool.wait_until_all_are_ready()
    sees = [{**pool.description, **worker} for worker in pool.description["workers"]]  # type: ignore[attr-defined]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in sees] == ["GPU-aa,GPU-bb", "GPU-cc,GPU-dd"]
    assert len({one["VLLM_PORT"] for one in sees}) == 2
    assert {one["OMP_NUM_THREADS"] for one in sees} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


def test_names_of_sockets_stay_short_enough(tmp_path: Path) -> None:
    environment = worker_environment({"PYTHONPATH": "/x"}, 0, ("3",), 9000, 4, tmp_path / ("long" * 20))
    assert environment["VLLM_RPC_BASE_PATH"] == "/tmp" and environment["PYTHONPATH"].endswith(":/x")
    assert "VLLM_RPC_BASE_PATH" not in worker_environment({}, 0, (), 9000, 4, Path("/tmp/short"))


def test_a_refused_request_is_named_and_the_others_go_on(open_pool: Open) -> None:
    pool = open_pool()
    asked = requests(4)
    submit(pool, asked)
    pool.submit("bad", Request(Prompt.of("refuse"), 0), SAMPLING)
    found: dict[str, Completion] = {}
    with pytest.raises(RequestRefused, match="bad: the prompt 'refuse' is too long") as error:
        while pool.unfinished:
            found |= dict(pool.step())
    assert error.value.key == "bad"
    found |= finish(pool)
    assert found == alone(asked)
    pool.submit("twice", asked[0], SAMPLING)
    with pytest.raises(ValueError, match="twice is in flight already"):
        pool.submit("twice", asked[0], SAMPLING)


def test_aborted_requests_never_come_back(open_pool: Open) -> None:
    pool = open_pool(OpenLetters(pause_s=0.005))
    asked = requests()
    submit(pool, asked)
    pool.abort([str(place) for place in range(0, 40, 2)])
    assert pool.unfinished <= 20
    submit_again = asked[0]
    pool.submit("0", submit_again, Sampling(1.0, 3))  # the same key for something else
    found = finish(pool)
    assert found.pop("0") == generate(LettersEngine(1, 0.0, None), [submit_again], Sampling(1.0, 3))[0]
    assert found == {key: made for key, made in alone(asked).items() if int(key) % 2}


def test_submitting_does_not_wait_for_workers_that_do_not_read(open_pool: Open, temporary: Path) -> None:
    pool = open_pool()
    pool.wait_until_all_are_ready()
    for pid in workers_of(temporary):
        os.kill(pid, signal.SIGSTOP)
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    asked = [Request(Prompt.of(f"picture {n}", Image.fromarray(noise)), n) for n in range(30)]
    submit(pool, asked)  # 30 MB, far more than sockets hold
    assert pool.step() == []
    for pid in workers_of(temporary):
        os.kill(pid, signal.SIGCONT)
    assert finish(pool) == alone(asked)


def test_closing_leaves_nothing_behind(open_pool: Open, temporary: Path) -> None:
    pool = open_pool(OpenLetters(pause_s=0.01), 3)
    submit(pool, requests(50))
    pool.step()
    pool.close()
    assert processes(temporary) == [] and list(temporary.iterdir()) == []
    pool.close()  # nothing more


def test_a_worker_that_does_not_end_is_killed(open_pool: Open, temporary: Path) -> None:
    pool = open_pool(OpenLetters(pause_s=600.0), 2)
    submit(pool, requests(2))
    pool.wait_until_all_are_ready()
    pool.step()
    pool.close(patience_s=0.2)
    assert processes(temporary) == [] and list(temporary.iterdir()) == []


@pytest.mark.parametrize("by", ["a signal", "closing"])
def test_nothing_is_left_of_what_an_engine_has_started(open_pool: Open, temporary: Path, by: str) -> None:
    pool = open_pool(count=1)
    pool.submit("a", Request(Prompt.of("helper"), 0), SAMPLING)
    finish(pool)
    (helper,) = processes(temporary, "multiprocessing.spawn")
    wait_for(lambda: len(shared_memory(helper)) == 2, "it has memory and a semaphore")
    shared = shared_memory(helper)
    assert all(path.exists() for path in shared)
    if by == "a signal":
        os.kill(workers_of(temporary)[0], signal.SIGKILL)
        while not pool.workers[0].deaths:
            pool._turn(0.1)
    pool.close(patience_s=0.5)
    assert processes(temporary) == [] and not any(path.exists() for path in shared)


def shared_memory(pid: int) -> set[Path]:
    return {Path(path) for path in re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text())}


PARENT = """
import signal, sys, time
from engines.letters import OpenLetters
from hpc_rl.engines.base import Prompt, Request, Sampling
from hpc_rl.engines.pool import EnginePool

asked_to_leave = []
for name in (signal.SIGTERM, signal.SIGINT):
    signal.signal(name, lambda number, frame: asked_to_leave.append(number))
pool = EnginePool(OpenLetters(pause_s=0.02), 2, gpus=[(), ()])
prompt = Prompt.of("a")
for number in range(200):
    pool.submit(str(number), Request(prompt, number), Sampling(1.0, 20))
pool.wait_until_all_are_ready()
print("ready", flush=True)
while pool.unfinished:
    pool.step()
deaths = sum(worker.deaths for worker in pool.workers)
print(f"done, {len(asked_to_leave)} signals, {deaths} deaths", flush=True)
pool.close()
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a pool, at work, leader of a process group."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": f"{tests.parent}:{tests}"}
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_nothing_outlives_a_pool_that_is_killed(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    assert len(workers_of(tmp_path)) == 2 and len(list(tmp_path.iterdir())) == 2
    parent.kill()
    parent.wait()
    wait_for(lambda: not processes(tmp_path), "all processes are gone")
    assert list(tmp_path.iterdir()) == []


def test_signals_for_the_task_do_not_reach_the_workers(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    os.killpg(parent.pid, signal.SIGTERM)
    os.killpg(parent.pid, signal.SIGINT)
    for pid in processes(tmp_path, "hpc_rl.engines.pool_"):
        os.kill(pid, signal.SIGTERM)  # also where every process of a step gets it
    assert parent.stdout is not None and parent.stdout.readline() == "done, 2 signals, 0 deaths\n"
    assert parent.wait(timeout=30) == 0
    assert processes(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_what_a_worker_opens_must_be_in_a_module(tmp_path: Path) -> None:
    script = "from hpc_rl.engines.pool import EnginePool\ndef f(n): pass\nEnginePool(f, 1, gpus=[()])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path.cwd())
    assert "put it into a module" in ended.stderr


def test_the_log_says_who_is_ready(open_pool: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pool = open_pool(OpenLetters(), 2)
    pool.wait_until_all_are_ready()
    for number in (0, 1):
        assert re.search(rf"worker {number + 1} of 2 on GPU {number} is ready after \d+ s, 4 samples at", caplog.text)
