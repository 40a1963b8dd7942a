"""The configuration files of a test cluster: slurm.conf, gres.conf, slurmdbd.conf, /etc/hosts."""

from __future__ import annotations

import os
import random
import secrets
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

CTL = "ctl"


@dataclass(frozen=True)
class Settings:
    """What a test cluster is like.

    Attributes
    ----------
    nodes, gpus, cpus, mem_mb
        Number of nodes, and what each pretends to have (the machine's real size does not matter).
    node_timeout_s
        Slurm's SlurmdTimeout. A dead node is noticed, and its jobs requeued, about 8 s after that: each ping is
        retried for MessageTimeout (5 s) first.
    requeue_delay_s
        How long a requeued job waits before it may start again. On a cluster with defaults it is 120 s: the lifetime
        of a job credential (man slurm.conf, AuthInfo, cred_expire); 5 s is the least that it accepts.
    grace_s
        GraceTime of partition `low`: from SIGTERM to SIGKILL when a job is preempted.
    min_job_age_s
        How long squeue and scontrol remember a finished job.
    """

    nodes: int = 4
    gpus: int = 2
    cpus: int = 4
    mem_mb: int = 4000
    node_timeout_s: int = 10
    requeue_delay_s: int = 5
    grace_s: int = 10
    min_job_age_s: int = 300

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node{i + 1}" for i in range(self.nodes))


@dataclass(frozen=True)
class Ports:
    """Where the daemons listen that the start-up waits for."""

    slurmdbd: int
    mariadbd: int


def free_ports(count: int) -> list[int]:
    """Ports that nothing on this machine listens on, below the range from which clients get theirs."""
    ports: list[int] = []
    generator = random.SystemRandom()  # two clusters that start at once must not look in the same order
    while len(ports) < count:
        port = generator.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, at no moment otherwise."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def write_settings(root: Path, settings: Settings) -> Ports:
    """Write every file that the daemons read below `root`; the keys and the password are new and private."""
    ctl_port, dbd_port, sql_port, *node_ports = free_ports(3 + settings.nodes)
    password = secrets.token_hex(16)
    gpus = root / "dev"
    for index in range(settings.gpus):
        # another /dev/null: nothing opens it, but Slurm sets CUDA_VISIBLE_DEVICES for character devices only
        os.mknod(gpus / f"gpu{index}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    write_private(root / "munge" / "key", secrets.token_bytes(128))
    etc = root / "etc"
    (etc / "hosts").write_text(_hosts(settings))
    (etc / "gres.conf").write_text(_gres_conf(gpus, settings))
    (etc / "slurm.conf").write_text(_slurm_conf(root, settings, ctl_port, node_ports, dbd_port))
    write_private(etc / "slurmdbd.conf", _slurmdbd_conf(root, dbd_port, sql_port, password).encode())
    write_private(root / "munge" / "accounting.sql", _accounting_sql(password).encode())
    return Ports(slurmdbd=dbd_port, mariadbd=sql_port)


def _addresses(settings: Settings) -> dict[str, str]:
    return {CTL: "127.0.1.254"} | {name: f"127.0.1.{i + 1}" for i, name in enumerate(settings.node_names)}


def _hosts(settings: Settings) -> str:
    lines = [f"{address} {name}" for name, address in _addresses(settings).items()]
    return "\n".join(["127.0.0.1 localhost", *lines]) + "\n"


def _gres_conf(gpus: Path, settings: Settings) -> str:
    if not settings.gpus:
        return ""
    return f"AutoDetect=off\nNodeName=node[1-{settings.nodes}] Name=gpu File={gpus}/gpu[0-{settings.gpus - 1}]\n"


def _slurm_conf(root: Path, settings: Settings, ctl_port: int, node_ports: list[int], dbd_port: int) -> str:
    addresses = _addresses(settings)
    gres = f"Gres=gpu:{settings.gpus}" if settings.gpus else ""
    # a port for each node: slurmd binds all addresses, and the nodes share one network (with NoInAddrAny srun breaks)
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={addresses[name]} Port={port}"
        for name, port in zip(settings.node_names, node_ports, strict=True)
    )
    return f"""\
ClusterName=test
SlurmctldHost={CTL}({addresses[CTL]})
SlurmctldPort={ctl_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire={settings.requeue_delay_s}
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
# --- one machine that pretends to be several, without cgroups
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
SwitchType=switch/none
# --- timers
SlurmctldTimeout=30
SlurmdTimeout={settings.node_timeout_s}
MessageTimeout=5
KillWait=5
MinJobAge={settings.min_job_age_s}
BatchStartTimeout=10
UnkillableStepTimeout=30
ReturnToService=1
# --- scheduling: react within a second (the defaults wait up to 60 s between passes, 30 s for heterogeneous jobs)
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_continue,default_queue_depth=500,bf_max_job_test=2000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=200
PriorityType=priority/multifactor
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a preempted job gets the signal it asked for with --signal (submitit: USR2) when its grace time starts
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
MaxJobCount=20000
MaxArraySize=1001
# --- accounting
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={root}/run/munge.sock
AccountingStorageTRES=gres/gpu
JobCompType=jobcomp/none
GresTypes=gpu
NodeName=DEFAULT CPUs={settings.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={settings.cpus} ThreadsPerCore=1 \
RealMemory={settings.mem_mb} {gres} State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace_s}
PartitionName=high PriorityTier=99 PreemptMode=OFF
"""


def _slurmdbd_conf(root: Path, dbd_port: int, sql_port: int, password: str) -> str:
    return f"""\
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
DbdHost={CTL}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""


def _accounting_sql(password: str) -> str:
    return f"""\
CREATE DATABASE slurm_acct_db;
CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
"""
