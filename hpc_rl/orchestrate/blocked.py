"""A job that cannot get on for reasons outside of it leaves with the code that has it started again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

from hpc_rl.cluster.failures import EXIT_BLOCKED

P = ParamSpec("P")
log = logging.getLogger("hpc_rl")


def blocked(main: Callable[P, int]) -> Callable[P, int]:
    """`@blocked` before a body's `main`: where others are to blame it returns `EXIT_BLOCKED`, and the log says why.

    That is when no server answered until the deadline (ServiceUnavailable), and when another process took the engine's
    slot over (SlotLost). What is committed stays.
    """

    @functools.wraps(main)
    def until_blocked(*args: P.args, **options: P.kwargs) -> int:
        try:
            return main(*args, **options)
        except RuntimeError as error:
            from hpc_rl.engines.compile_cache import SlotLost
            from hpc_rl.services.calling import ServiceUnavailable

            if not isinstance(error, (ServiceUnavailable, SlotLost)):
                raise
            log.error("%s: %s", type(error).__name__, error)
            return EXIT_BLOCKED

    return until_blocked
