"""A call that nobody answers, and the reason that its client gives for it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from hpc_rl.services.calling import ServiceClient, ServiceUnavailable


def is_unavailable(service: ServiceClient, problem: str, call: Callable[[], object]) -> None:
    """`call` ends at the deadline of `service`, because of this `problem` (a pattern).

    On a busy machine a client may not have found out so soon what the matter is; then it is given more time.
    """
    said = ""
    for deadline_s in (0.5, 5.0, 50.0):
        service._options = service._options.model_copy(update={"deadline_s": deadline_s})
        with pytest.raises(ServiceUnavailable) as caught:
            call()
        said = str(caught.value)
        if re.search(problem, said):
            return
    raise AssertionError(f"{problem!r} is not what it said: {said}")
