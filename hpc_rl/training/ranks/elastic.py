"""torchrun with an exit code that says what happened: that of the rank which failed first, or 143 when told to leave.

torchrun itself ends with 1 whatever happened, so a batch script could not tell a job that saved and left, and is to be
queued again, from one that failed. All else is torchrun's: `python -m hpc_rl.training.ranks.elastic` takes its options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: Sequence[str] | None = None) -> int:
    """Start this node's ranks and wait for them; 128 + the signal's number for one that ended them."""
    try:
        run(parse_args(argv))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        print(error, flush=True)
        _, first = error.get_first_failure()
        return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
