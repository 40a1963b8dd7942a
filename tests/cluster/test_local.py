"""The local executor with real processes: dependencies, the limit of tasks, services, GPUs, and who dies with whom."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.cluster.base import ExecutorError, JobRequest, Resources
from hpc_rl.cluster.entry import Spec
from hpc_rl.cluster.local import LocalExecutor
from hpc_rl.orchestrate.graph import Kind, StageId
from hpc_rl.orchestrate.reconcile import end_records
from hpc_rl.run.code import source_root
from hpc_rl.run.workspace import Workspace
from tests.waiting import is_alive, wait_for

FOR_LONG = "import time; print('x', flush=True); time.sleep(600)"


class Machine:
    """A local executor and the jobs handed to it, by name."""

    def __init__(self, tmp_path: Path, limit: int, gpus: tuple[str, ...] = ()) -> None:
        self.tmp_path, self.executor, self.ids = tmp_path, LocalExecutor(limit, gpus), dict[str, str]()

    def request(
        self,
        name: str,
        body: str,
        kind: Kind = Kind.SINGLE,
        after_end: tuple[str, ...] = (),
        after_start: tuple[str, ...] = (),
        beside: tuple[JobRequest, ...] = (),
        delay_s: float = 0.0,
        **resources: int,
    ) -> JobRequest:
        spec = Spec(name, str(self.tmp_path / "run"), 1, name, 0, "local", (sys.executable, "-u", "-c", body), {})
        spec.save()
        ended, started = (tuple(self.ids[n] for n in names) for names in (after_end, after_start))
        wanted = Resources(**resources)  # type: ignore[arg-type]
        return JobRequest(spec, kind, wanted, source_root(), ended, started, beside, delay_s)

    def submit(self, name: str, body: str, kind: Kind = Kind.SINGLE, **options: Any) -> None:
        self.executor.submit(
            self.request(name, body, kind, **options), lambda job_id: self.ids.__setitem__(name, job_id)
        )

    def states(self, name: str) -> list[str]:
        self.executor.poll()
        return [job.state for job in self.executor.queue([name])]

    def running(self) -> int:
        self.executor.poll()
        return sum(job.state == "RUNNING" for job in self.executor.queue(list(self.ids)))

    def until_told(self, before: str = "pass", after: str = "pass") -> str:
        """A body that goes on when `tell` is called."""
        wait = f"while not pathlib.Path({str(self.tmp_path / 'told')!r}).exists(): time.sleep(0.01)"
        return f"import os, pathlib, time\n{before}\n{wait}\n{after}"

    def tell(self) -> None:
        """Let the bodies of `until_told` go on."""
        (self.tmp_path / "told").touch()

    def wait(self, *names: str) -> None:
        """Until these jobs have ended; all of them when none is named."""
        wait_for(lambda: not any(self.states(name) for name in names or self.ids), f"the end of {names or 'all'}")

    def wait_for_body(self, name: str) -> None:
        """Until a job's body has said something: its entry hears signals by then."""
        wait_for(lambda: self.states(name) == ["RUNNING"] and self.log(name), f"the body of {name}")

    def outcomes(self, name: str) -> list[str]:
        ws = Spec(name, str(self.tmp_path / "run"), 1, name, 0, "local", (), {}).ws
        return [end.outcome for end in end_records(ws, StageId(1, name))]

    def log(self, name: str) -> str:
        logs = (self.tmp_path / "run" / "logs" / "round_01" / name).glob("*.out")
        return "".join(sorted(path.read_text() for path in logs))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Makes machines and shuts them down."""
    made = []

    def make(limit: int = 2, gpus: tuple[str, ...] = ()) -> Machine:
        made.append(Machine(tmp_path, limit, gpus))
        return made[-1]

    yield make
    for one in made:
        one.executor.shutdown(5)


def test_a_job_starts_when_those_it_follows_have_ended_however(machine: Callable[..., Machine]) -> None:
    here = machine()
    here.submit("first", here.until_told(after="raise ValueError"))
    here.submit("second", "pass", after_end=("first",))
    assert (here.states("first"), here.states("second")) == (["RUNNING"], ["PENDING"])
    here.tell()
    here.wait("first")
    here.wait("second")
    assert (here.outcomes("first"), here.outcomes("second")) == (["error"], ["done"])


def test_a_job_that_is_to_wait_does_not_start_before_its_time_and_keeps_nobody_from_starting(
    machine: Callable[..., Machine],
) -> None:
    here = machine(limit=1)
    here.submit("much later", "pass", delay_s=3600.0)
    here.submit("later", "pass", delay_s=0.3)
    asked = time.time()
    here.submit("now", "pass")
    here.wait("now", "later")
    assert here.states("much later") == ["PENDING"]
    assert here.log("later") == "" and here.outcomes("later") == here.outcomes("now") == ["done"]
    (ended,) = end_records(Workspace(here.tmp_path / "run"), StageId(1, "later"))
    assert ended.ended - asked >= 0.25


def test_no_more_tasks_run_at_once_than_allowed(machine: Callable[..., Machine]) -> None:
    here = machine(limit=2)
    here.submit("array", here.until_told("print('x', flush=True)"), Kind.ARRAY, tasks=5)
    wait_for(lambda: here.running() and here.log("array") == "x\n" * 2, "two bodies")
    most = here.running()
    here.tell()
    while here.states("array"):
        most = max(most, here.running())
    assert most == 2
    assert here.outcomes("array") == ["done"] * 5


def test_services_do_not_count_and_their_users_wait_for_their_start(machine: Callable[..., Machine]) -> None:
    here = machine(limit=1)
    here.submit("gate", here.until_told())
    here.submit("service", FOR_LONG, Kind.SERVICE, after_end=("gate",))
    here.submit("consumer", "pass", after_start=("service",))
    here.submit("another", "pass", after_start=("service",))
    assert here.states("consumer") == ["PENDING"]
    here.tell()
    here.wait("consumer", "another")
    assert here.states("service") == ["RUNNING"]
    assert here.outcomes("consumer") == ["done"]


def test_replicas_start_all_and_a_consumer_waits_for_the_first(machine: Callable[..., Machine]) -> None:
    here = machine(limit=1)
    here.submit("service", FOR_LONG, Kind.SERVICE, tasks=3)
    here.ids["first replica"] = f"{here.ids['service']}_0"
    here.submit("consumer", "pass", after_start=("first replica",))
    here.wait("consumer")
    assert here.states("service") == ["RUNNING"] * 3
    assert {job.job_id for job in here.executor.queue(["service"])} == {f"{here.ids['service']}_{n}" for n in range(3)}


def test_a_service_beside_a_job_waits_for_what_the_job_waits_for_and_is_cancelled_by_its_own_name(
    machine: Callable[..., Machine],
) -> None:
    here = machine(limit=1)
    here.submit("gate", here.until_told())
    service = here.request("service", FOR_LONG, Kind.SERVICE)
    here.submit("consumer", "pass", after_end=("gate",), beside=(service,))
    assert here.states("service") == ["PENDING"]
    here.tell()
    here.wait("gate")
    here.wait_for_body("service")
    here.wait("consumer")
    here.executor.cancel(["service"])
    here.wait("service")
    assert (here.outcomes("consumer"), here.outcomes("service")) == (["done"], ["left"])


def test_the_ranks_of_a_job_start_together_and_know_each_other(machine: Callable[..., Machine]) -> None:
    here = machine(limit=1)
    words = "'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'HPC_RL_NODELIST_HEAD'"
    here.submit(
        "train", f"import os; print(*(os.environ[n] for n in ({words})))", Kind.MULTINODE, nodes=2, ranks_per_node=2
    )
    here.wait()
    assert here.log("train") == "".join(f"{rank} 4 {rank} 4 localhost\n" for rank in range(4))


def test_gpus_are_dealt_out_and_given_back(machine: Callable[..., Machine]) -> None:
    here = machine(limit=8, gpus=("3", "5"))
    body = here.until_told("print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)")
    here.submit("array", body, Kind.ARRAY, tasks=3, gpus_per_node=1)
    here.submit("both", body, gpus_per_node=2)
    assert here.running() == 2
    here.tell()
    here.wait()
    assert sorted(here.log("array").split())[0] == "3"
    assert here.log("both") == "3,5\n"


def test_a_job_that_wants_more_gpus_than_there_are_is_refused_with_the_way_out(machine: Callable[..., Machine]) -> None:
    with pytest.raises(ExecutorError, match=r"train asks for 8 GPUs, this machine has 2\. .*stages\.train\.gpus_per"):
        machine(gpus=("0", "1")).submit("train", "pass", gpus_per_node=8)


def test_waiting_elements_are_cancelled_and_running_ones_left_alone(machine: Callable[..., Machine]) -> None:
    here = machine(limit=1)
    here.submit("array", here.until_told(), Kind.ARRAY, tasks=3)
    here.submit("after", "pass", after_end=("array",))
    assert here.running() == 1
    here.executor.cancel(["array"], waiting_only=True)
    assert here.states("array") == ["RUNNING"]
    here.tell()
    here.wait()
    assert here.outcomes("array") == ["done"]
    assert here.outcomes("after") == ["done"]


def test_a_cancelled_job_is_told_to_leave(machine: Callable[..., Machine]) -> None:
    here = machine()
    here.submit("job", FOR_LONG)
    here.wait_for_body("job")
    here.executor.cancel(["job"])
    here.wait()
    assert here.outcomes("job") == ["left"]


def test_shutting_down_asks_first_and_kills_those_that_stay(machine: Callable[..., Machine]) -> None:
    here = machine()
    here.submit("stubborn", "import signal, time; signal.signal(15, signal.SIG_IGN); print('x'); time.sleep(600)")
    here.wait_for_body("stubborn")
    here.executor.shutdown(patience_s=0.5)
    assert here.states("stubborn") == [], "nothing of it is left when this returns"


LAUNCHER = """
import sys, time
from pathlib import Path
from tests.cluster.test_local import Machine
here = Machine(Path(sys.argv[1]), 2)
here.submit("job", "import os, time; print(os.getpid()); time.sleep(600)")
while True:
    here.executor.poll()
    time.sleep(0.02)
"""


def test_jobs_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], cwd=source_root())
    logs = tmp_path / "run" / "logs" / "round_01" / "job"
    wait_for(lambda: any(path.read_text().strip() for path in logs.glob("*.out")), "the job's body", of=launcher)
    body = int(next(logs.glob("*.out")).read_text())
    assert is_alive(body)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not is_alive(body), "the end of the job, which outlived its launcher")


def test_what_a_machine_would_run_can_be_shown(machine: Callable[..., Machine]) -> None:
    spec = Spec("run-r01-train-a1-x", "/w", 1, "train", 1, "local", ("python",), {})
    request = JobRequest(spec, Kind.MULTINODE, Resources(nodes=2, ranks_per_node=2), Path("/code"))
    (line,) = machine().executor.render(request)
    assert line.endswith("-m hpc_rl.cluster.entry /w/rounds/round_01/train/attempts/run-r01-train-a1-x.json   # × 4")
