"""Reference solutions as chosen answers: only those that are right, and that the solver's chat template can show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from hpc_rl.data.dpo import Solution
from hpc_rl.data.questions import Question
from hpc_rl.grading.answers import Answers, Checker

if TYPE_CHECKING:
    from hpc_rl.config.prosetting import SolverConfig
    from hpc_rl.training.data.encoding import Encoder

COUNTS = ("no_reference_solution", "wrong_reference_solution", "unusable_reference_solution")


class Solutions:
    """Finds the solution of a question (`hpc_rl.data.dpo.Solve`).

    Parameters
    ----------
    wanted
        Whether solutions are to be used at all.
    answers
        How they are checked: one that gives another answer than the question's is none.
    solver
        Its tokenizer is loaded when the first solution is needed.

    Attributes
    ----------
    counts
        Questions that have none, a wrong one, or one that the chat template does not show as an answer to the prompt:
        it holds a control token, or thoughts belong before it.
    """

    def __init__(self, wanted: bool, answers: Answers, solver: SolverConfig) -> None:
        self._wanted, self._checker, self._solver = wanted, Checker(answers), solver
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def __call__(self, question: Question, prompt: Sequence[Mapping[str, str]]) -> Solution | None:
        """The solution, or None."""
        if not self._wanted:
            return None
        if not question.solution:
            self.counts["no_reference_solution"] += 1
            return None
        verdict = self._checker.verdict(self._checker.reference(question.answer), question.solution)
        if verdict.right is False:
            self.counts["wrong_reference_solution"] += 1
            return None
        token_ids = self._encode(prompt, question.solution)
        if not token_ids:
            self.counts["unusable_reference_solution"] += 1
            return None
        return Solution(question.solution, token_ids)

    def _encode(self, prompt: Sequence[Mapping[str, str]], text: str) -> list[int]:
        """What the template puts behind the prompt for this answer, as training would; nothing where it does not."""
        from hpc_rl.training.data.encoding import NotShown

        try:
            return self._encoder.answer(prompt, text)
        except NotShown:
            return []

    @cached_property
    def _encoder(self) -> Encoder:
        from hpc_rl.engines.loading import load_processor
        from hpc_rl.training.data.encoding import Encoder

        return Encoder(load_processor(self._solver.path), self._solver.chat_template_kwargs)
