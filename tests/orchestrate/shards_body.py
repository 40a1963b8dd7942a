"""A body for tests of the job frame: writes each of its shards slowly, line by line.

`MODE` says how it misbehaves: `hang` never ends its first shard, `raise` fails in it, `hold` waits for a line on
standard input before it commits.
"""

from __future__ import annotations

import os
import sys
import time

from hpc_rl.orchestrate.job import open_job

LINES = 20


def main() -> int:
    """Returns 0."""
    job, mode, seconds = open_job("cut"), os.environ.get("MODE", ""), float(os.environ.get("SECONDS", "0.1"))
    for shard in job.shards():
        path = shard.output("lines.txt")
        with path.open("w") as file:
            for line in range(LINES):
                file.write(f"{shard.index} {line}\n")
                file.flush()
                shard.progress(line, LINES)
                time.sleep(seconds / LINES)
                if line == LINES // 2 and mode:
                    print(f"middle {shard.index}", flush=True)
                    if mode == "raise":
                        raise RuntimeError("a bad shard")
                    if mode == "hang":
                        time.sleep(1000)
                    if mode == "hold":
                        sys.stdin.readline()
        won = shard.commit([path], made_from={"by": os.getpid()}, metrics={"lines": LINES})
        print(f"committed {shard.index} {won}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
