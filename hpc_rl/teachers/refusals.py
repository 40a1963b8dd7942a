"""Noticing an endpoint that takes nothing as it is: then every question would be left out, and the run go on so."""

from __future__ import annotations

from hpc_rl.services.calling import ServiceRefused
from hpc_rl.teachers.cache import Answer
from hpc_rl.teachers.calls import Problem

FIRST = 16
"""Different questions, the first that are sent. Some of them would be answered by an endpoint that answers any."""


class Refusals:
    """Counts the refused ones among the first questions, until one is answered. For one event loop.

    Parameters
    ----------
    section
        Where the client's options are in the config, for the way out.
    structured
        `client.structured`.
    """

    def __init__(self, section: str, structured: str) -> None:
        self._section, self._structured = section, structured
        self._refused: dict[str, bool] = {}  # of the first, by key
        self._over = False

    def sent(self, key: str) -> None:
        """This is asked now."""
        if not self._over and len(self._refused) < FIRST:
            self._refused.setdefault(key, False)

    def answered(self) -> None:
        """It has answered something, now or earlier."""
        self._over = True

    def ended(self, key: str, outcome: Answer | Problem) -> None:
        """What came of it.

        Raises
        ------
        ServiceRefused
            When all of the first are refused.
        """
        if not isinstance(outcome, Problem):
            self.answered()
            return
        if self._over or key not in self._refused:
            return
        if outcome.kind != "refused":
            del self._refused[key]  # another one takes its place
            return
        self._refused[key] = True
        if sum(self._refused.values()) == FIRST:
            raise ServiceRefused(
                f"{outcome.text}. So the first {FIRST} questions were refused, and none was answered. Look at "
                f"{self._section}: structured ({self._structured}; json_object and none ask less of it), "
                "extra_body and max_tokens_field, where it does not know a field; max_tokens and model, where the "
                "model's context is too short"
            )
