"""Whether the kernel's memory killer was at work: a process that it ends can say nothing. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

SAID = "the kernel's memory killer ended it: more memory was used than the job has (oom_kill of its control group)"

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def kills(proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of our control group, and of those below it, it has ended so far; 0 where there is none.

    Parameters
    ----------
    proc, mounted
        Which groups we are in, and where they are mounted: version 2 (cgroup-v2.rst, "memory.events") or the memory
        controller of version 1 (memory.rst, "memory.oom_control"), which Slurm uses on older systems.
    """
    total = 0
    for line in proc.read_text().splitlines() if proc.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            file = mounted / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            file = mounted / "memory" / path.lstrip("/") / "memory.oom_control"
        else:
            continue
        try:
            found = _COUNT.search(file.read_text())
        except OSError:  # not mounted here, or of another name in this container
            continue
        total += int(found[1]) if found else 0
    return total
