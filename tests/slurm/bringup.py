"""Bringing up the daemons of a test cluster, in the order in which they need each other."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.slurm.hosts import Hosts, wait_for
from tests.slurm.settings import CTL, Settings, write_settings

DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")
TOOLS = ("sbatch", "srun", "nsenter", "unshare", "setsid", "mount", "env")


def why_unavailable() -> str | None:
    """Why no cluster can be started on this machine, in a sentence for people; None when one can."""
    if sys.platform != "linux":
        return "the Slurm test cluster needs Linux"
    if os.geteuid() != 0:
        return "the Slurm test cluster needs root (it makes host names and mounts of its own)"
    missing = [name for name in (*DAEMONS, *TOOLS) if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} not found): run tests/slurm/install.sh"
    if not Path("/etc/slurm").is_dir():
        return "the folder /etc/slurm is missing (the hosts mount their own over it): mkdir /etc/slurm"
    namespaces = ["unshare", "--pid", "--fork", "--uts", "--mount", "mount", "-t", "proc", "proc", "/proc"]
    probe = subprocess.run(namespaces, capture_output=True, text=True)
    if probe.returncode:
        return f"namespaces cannot be made here (a container without CAP_SYS_ADMIN?): {probe.stderr.strip()}"
    return None


def search_path() -> str:
    """PATH with the folders in which Debian keeps daemons."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


class Daemons:
    """Starts the daemons of the cluster in `root` on its hosts; they end with the hosts."""

    def __init__(self, root: Path, hosts: Hosts, env: Mapping[str, str]) -> None:
        self.root = root
        self.hosts = hosts
        self.env = dict(env)

    def start(self, settings: Settings, *, detached: bool) -> None:
        """Make folders, keys, configuration and hosts, then start every daemon (nodes register a moment later)."""
        # munged refuses keys and sockets below a folder that others can write to, so modes do not depend on the umask
        for name in ("", "etc", "run", "log", "state", "spool", "dev", "munge", "sql", "sql-tmp"):
            (self.root / name).mkdir(parents=not name)
            (self.root / name).chmod(0o700 if name in ("munge", "sql", "sql-tmp", "state") else 0o755)
        ports = write_settings(self.root, settings)
        self.hosts.start(detached=detached)
        run, munge = self.root / "run", self.root / "munge"
        self.launch(
            *("munged", f"--key-file={munge}/key", f"--seed-file={munge}/seed", "--num-threads=4"),
            *(f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid", f"--log-file={self.root}/log/munged.log"),
        )
        self._start_database(ports.mariadbd)
        self.launch("slurmdbd")
        _wait_for_port(ports.slurmdbd, "slurmdbd")
        self.launch("sacctmgr", "--immediate", "add", "cluster", "test")
        self.launch("slurmctld")
        for node in settings.node_names:
            self.start_node(node)

    def _start_database(self, port: int) -> None:
        sql = f"--datadir={self.root}/sql"
        # of its own: a server that starts removes what looks like temporary tables, of another cluster's server too
        tmp = f"TMPDIR={self.root}/sql-tmp"
        self.launch(
            *("env", tmp, "mariadb-install-db", "--no-defaults", sql, "--user=root", "--skip-test-db"),
            *("--auth-root-authentication-method=socket", "--auth-root-socket-user=root"),
        )
        self.launch(
            *("env", tmp, "setsid", "--fork", "mariadbd", "--no-defaults", sql, "--user=root"),
            *(f"--socket={self.root}/run/sql.sock", f"--pid-file={self.root}/run/mariadbd.pid"),
            *("--bind-address=127.0.0.1", f"--port={port}", "--skip-name-resolve"),
            *(f"--init-file={self.root}/munge/accounting.sql", "--performance-schema=off"),
            *("--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0"),
            "--innodb-lock-wait-timeout=900",  # slurmdbd insists on it
        )
        _wait_for_port(port, "MariaDB")

    def start_node(self, name: str) -> None:
        """Boot a node."""
        self.launch("slurmd", host=name)

    def launch(self, *argv: str, host: str = CTL) -> None:
        """Run a command that returns when it has put its daemon into the background (or when its work is done)."""
        with (self.root / "log" / "start.log").open("a") as log:
            command = self.hosts.command(host, argv)
            done = subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if done.returncode:
            raise RuntimeError(f"{argv[0]} on {host} ended with status {done.returncode}")

    def log_tails(self) -> str:
        """The last lines of every daemon's log, for an error message."""
        tails = []
        for path in sorted((self.root / "log").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-6:]
            tails.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(tails)


def _wait_for_port(port: int, what: str) -> None:
    def listening() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listening, f"{what} to listen on port {port}")
