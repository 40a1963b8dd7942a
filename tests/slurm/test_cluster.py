"""The test cluster behaves like a real one where it matters to this project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import SlurmCluster
from tests.slurm.hosts import wait_for
from tests.slurm.settings import Settings


def script(folder: Path, body: str) -> str:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{body}\n")
    return str(path)


def test_each_node_has_its_own_name_and_gpus(cluster: SlurmCluster) -> None:
    report = 'echo "$(hostname) $CUDA_VISIBLE_DEVICES"'
    step = ["srun", "--nodes=4", "--ntasks=4", "--gpus-per-node=2", "sh", "-c", report]
    assert sorted(cluster.run(step).stdout.splitlines()) == [f"{node} 0,1" for node in cluster.nodes]


def test_a_server_on_one_node_is_reached_by_name_from_another(cluster: SlurmCluster, tmp_path: Path) -> None:
    serve = """
import http.server, pathlib, socket
server = http.server.HTTPServer((socket.gethostname(), 0), http.server.SimpleHTTPRequestHandler)
pathlib.Path("url.tmp").write_text(f"http://{socket.gethostname()}:{server.server_port}/hello")
pathlib.Path("url.tmp").rename("url")
server.serve_forever()
"""
    (tmp_path / "hello").write_text("from the other side")
    cluster.sbatch(f"--wrap={sys.executable} -c '{serve}'", "--nodelist=node3", cwd=tmp_path)
    wait_for((tmp_path / "url").exists, "the server's address")
    url = (tmp_path / "url").read_text()
    assert url.startswith("http://node3:")
    ask = f"import urllib.request; print(urllib.request.urlopen('{url}').read().decode())"
    assert cluster.run(["srun", "--nodelist=node1", sys.executable, "-c", ask]).stdout == "from the other side\n"


def test_commands_find_the_cluster_without_slurm_conf(cluster: SlurmCluster) -> None:
    """submitit drops SLURM_CONF from a job's environment, so the default path must lead to the same cluster."""
    assert "node4" in cluster.run(["env", "-u", "SLURM_CONF", "scontrol", "show", "nodes"], host="node1").stdout


def test_array_elements_run_side_by_side(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--array=0-7", "--output=%a.out", "--wrap=echo $SLURM_ARRAY_TASK_ID $(hostname)", cwd=tmp_path)
    cluster.wait_for_empty_queue()
    lines = [(tmp_path / f"{i}.out").read_text().split() for i in range(8)]
    assert [int(line[0]) for line in lines] == list(range(8))
    assert cluster.job(f"{job}_3")["ArrayTaskId"] == "3"


def test_jobs_of_a_killed_node_die_with_all_their_children_and_run_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    hidden = "setsid setsid sleep 998 & sleep 999"  # a child in a session of its own, as servers and workers have
    body = f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0\n{hidden}'
    job = cluster.sbatch("--requeue", script(tmp_path, body), cwd=tmp_path)
    node = cluster.wait_for_state(job, "RUNNING")["NodeList"]
    wait_for(lambda: len(cluster.processes(node, "sleep 99")) >= 2, "both children")
    with cluster.node_killed(node):
        assert not cluster.processes(node)
        after = cluster.wait_for_state(job, "COMPLETED")
        assert after["Restarts"] == "1"
        assert after["NodeList"] != node
    assert cluster.state(cluster.sbatch(f"--nodelist={node}", "--wait", "--wrap=true", cwd=tmp_path)) == "COMPLETED"


def test_a_higher_partition_preempts_and_requeues(cluster: SlurmCluster, tmp_path: Path) -> None:
    body = 'trap "echo asked to leave" TERM\n[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0\nsleep 999 & wait; wait'
    whole = ("--exclusive", "--nodes=4")
    options = ("--partition=low", "--requeue", "--open-mode=append", "--output=low.out", *whole)
    low = cluster.sbatch(*options, script(tmp_path, body), cwd=tmp_path)
    cluster.wait_for_state(low, "RUNNING")
    high = cluster.sbatch("--partition=high", *whole, "--wrap=true", cwd=tmp_path)
    cluster.wait_for_state(high, "COMPLETED")
    assert cluster.wait_for_state(low, "COMPLETED")["Restarts"] == "1"


def test_sacct_remembers_jobs(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--wrap=exit 3", "--gpus=1", cwd=tmp_path)
    cluster.wait_for_state(job, "FAILED")
    query = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", f"--jobs={job}"]
    wait_for(lambda: cluster.run(query).stdout.strip() == "FAILED|3:0", "sacct to know the job")


def test_two_clusters_run_side_by_side_and_one_dies_with_its_owner(cluster: SlurmCluster) -> None:
    root = cluster.root.with_name("other")
    code = f"""
import time
from pathlib import Path
from tests.slurm.cluster import SlurmCluster
cluster = SlurmCluster(Path({str(root)!r}), nodes=1)
cluster.start()
print(cluster.sbatch("--chdir=/", "--output=/dev/null", "--wrap=setsid sleep 997"), flush=True)
time.sleep(600)
"""
    other = SlurmCluster(root, settings=Settings(nodes=1))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline().strip() == "2"  # 1 was the start-up's own probe: it has a queue of its own
            wait_for(lambda: other.processes("node1", "sleep 997"), "its job to run")
            keeper = other.hosts.pid("node1")
        finally:
            owner.kill()
    wait_for(lambda: not Path(f"/proc/{keeper}").exists(), "the orphaned cluster to end")
    wait_for(lambda: not root.exists(), "its folder to go")
    assert cluster.run(["sinfo", "--noheader", "--states=idle", "--format=%D"]).stdout.split()[0] == "4"
