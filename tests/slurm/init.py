"""Process 1 of a test cluster: makes its hosts, reaps its orphans, and takes everything down with it when it ends.

It runs in a PID namespace of its own, so the kernel kills every process of the cluster (daemons, jobs, whatever they
put into sessions of their own) at the moment this one ends, and the mount and UTS namespaces vanish with them. It ends
when its standard input is closed: the pipe's other end is held by the process that owns the cluster, so even a
`kill -9` of the test session leaves nothing behind.

Run as ``python init.py ROOT detached|owned HOST...``; needs nothing but the standard library.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# /proc is still the machine's when the pid is read, so it is the pid by which the machine knows this host.
HOST_SETUP = """
set -eu
read -r pid rest </proc/self/stat
hostname "$1"
mount --bind "$2/etc/hosts" /etc/hosts
mount --bind "$2/etc" /etc/slurm
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t proc proc /proc
printf '%s\\n' "$pid" >"$2/hosts/$1.tmp"
mv "$2/hosts/$1.tmp" "$2/hosts/$1"
exec sleep infinity
"""


def main() -> int:
    root, mode, *hosts = sys.argv[1:]
    pid = Path("/proc/self/stat").read_text().split()[0]
    for host in hosts:
        setup = ["sh", "-c", HOST_SETUP, "host", host, root]
        subprocess.Popen(["unshare", "--uts", "--mount", "--propagation", "private", *setup], stdin=subprocess.DEVNULL)
    ready = Path(root, "hosts", "init.tmp")
    ready.write_text(f"{pid}\n")
    ready.rename(ready.with_suffix(""))
    while True:
        closed, _, _ = select.select([0] if mode == "owned" else [], [], [], 0.5)
        if closed and not os.read(0, 1):
            os.kill(-1, signal.SIGKILL)
            shutil.rmtree(root, ignore_errors=True)
            return 0
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass


if __name__ == "__main__":
    sys.exit(main())
