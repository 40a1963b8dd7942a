r"""Field names and values as question files have them, made into a question, an answer and a solution (S15).

Case, spaces and underscores in names do not count: `Final Answer` and `finalAnswer` are `final_answer`. Of several
names the first in the table that has a value counts; null and empty text are no value.

| ours | names in files |
|---|---|
| question | question, problem, prompt, instruction, query, input |
| answer | answer, final_answer, ground_truth, target, expected_answer, reference_answer, reference, gold, and `ground_truth` in `reward_model` |
| solution | solution, reference_solution, worked_solution, rationale, reasoning, explanation |

| what stands there | what it becomes | as in |
|---|---|---|
| a number | its text, as it is written; a whole float of a parquet file without `.0` | AIME, the seed |
| a list of one value | that value | OlympiadBench |
| a chat as question | its one user message; a system message is left to `questions.system_prompt` | verl, DAPO |
| `input` beside `instruction`, `body` before `question` | both texts | Alpaca, SVAMP |
| an answer whose last line is `#### 72` | answer 72; what stands before it is the solution, without `<<8*9=72>>` and with `\boxed{72}` at its end, unless there is one | GSM8K |
| no answer, but a solution with `\boxed{72}` (the last one) or with `#### 72` as last line | answer 72 | MATH, NuminaMath |
| an answer with `\boxed{72}` in it | answer 72 | |

All other fields are ignored. So is a file's own id: a question is named after its row.
"""  # noqa: E501  # a table's row is one line

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from hpc_rl.grading.extraction import answer_of

QUESTION = ("question", "problem", "prompt", "instruction", "query", "input")
ANSWER = (
    "answer", "final_answer", "ground_truth", "target", "expected_answer", "reference_answer", "reference", "gold",
)  # fmt: skip
SOLUTION = ("solution", "reference_solution", "worked_solution", "rationale", "reasoning", "explanation")
NESTED = ("reward_model",)
BESIDE = ("input", "body")

_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


class FieldError(ValueError):
    """A row that is no question: which field, what is wrong with it, what was expected."""

    def __init__(self, field: str, what: str, expected: str) -> None:
        super().__init__(f"{field}: {what}; expected {expected}")
        self.field, self.what, self.expected = field, what, expected


def normalise(row: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Question, answer and solution of a row, by the tables above.

    Raises
    ------
    FieldError
        Where it has no question or no answer, or one that is not text.
    """
    names = _names(tuple(row))
    question = _first(row, names, "question", QUESTION)
    if question is None:
        raise _absent("question", QUESTION, names, row)
    question = _with_what_stands_beside(row, names, question)
    answer = _first(row, names, "answer", ANSWER) or _nested_answer(row, names)
    solution = _first(row, names, "solution", SOLUTION)
    if answer is None and solution is not None:
        answer = _boxed(solution)
        answer = _after_hashes(solution)[1] if answer is None else answer
    if answer is None:
        raise _absent("answer", ANSWER, names, row)
    worked, after = _after_hashes(answer)
    if after is not None:
        answer, worked = after, _CALCULATION.sub("", worked).strip()
        solution = solution or (f"{worked}\n\\boxed{{{answer}}}" if worked else None)
    answer = _boxed(answer) or answer
    for name, text in (("question", question), ("answer", answer), ("solution", solution or "")):
        if not text.isascii() and _SURROGATE.search(text):
            raise FieldError(name, "its bytes are not UTF-8", "text in UTF-8")
    return question, answer, solution


@lru_cache(maxsize=256)
def _names(keys: tuple[str, ...]) -> Mapping[str, str]:
    """The names that count, as the file spells them; rows of a file have the same ones, so this is looked up once."""
    known = {plain_name(name): name for name in (*QUESTION, *ANSWER, *SOLUTION, *NESTED, *BESIDE)}
    found: dict[str, str] = {}
    for key in keys:
        if (name := known.get(plain_name(key))) is not None:
            found.setdefault(name, key)
    return found


def plain_name(name: str) -> str:
    """A field name without what does not count in it."""
    return re.sub(r"[\W_]", "", str(name)).lower()


def _first(row: Mapping[str, Any], names: Mapping[str, str], field: str, among: tuple[str, ...]) -> str | None:
    for name in among:
        if name in names:
            value = row[names[name]]
            text = _chat(names[name], value) if field == "question" else None
            text = _text(names[name], value) if text is None else text
            if text is not None:
                return text
    return None


def _with_what_stands_beside(row: Mapping[str, Any], names: Mapping[str, str], question: str) -> str:
    if "body" in names and "question" in names and (body := _text(names["body"], row[names["body"]])):
        return f"{body} {question}"
    if "instruction" in names and "input" in names and _text(names["instruction"], row[names["instruction"]]):
        given = _text(names["input"], row[names["input"]])
        return f"{question}\n\n{given}" if given is not None and given != question else question
    return question


def _nested_answer(row: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    value = row[names["reward_model"]] if "reward_model" in names else None
    if isinstance(value, Mapping):
        return _text(f"{names['reward_model']}.ground_truth", value.get("ground_truth"))
    return None


def _text(field: str, value: Any) -> str | None:
    """Text of a value; None for null and for empty text."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, (list, tuple)) and len(value) == 1 and not isinstance(value[0], (list, tuple)):
        return _text(field, value[0])
    if isinstance(value, (list, tuple)) and not value:
        return None
    raise FieldError(field, f"{_shown(value)} is {_kind(value)}", "text or a number")


def _chat(field: str, value: Any) -> str | None:
    """The user's message of a chat; None where the value is no chat."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Mapping) for one in value):
        return None
    said = [one.get("content") for one in value if one.get("role") == "user"]
    others = [one.get("role") for one in value if one.get("role") not in ("user", "system")]
    if len(said) != 1 or others:
        roles = ", ".join(str(one.get("role")) for one in value)
        raise FieldError(field, f"a chat of {roles}", "one message of the user, with or without a system message")
    return _text(field, said[0])


def _absent(field: str, among: tuple[str, ...], names: Mapping[str, str], row: Mapping[str, Any]) -> FieldError:
    empty = [names[name] for name in among if name in names]
    if empty:
        what = f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty"
    else:
        what = f"there is none among its fields ({_shown(', '.join(map(str, row))) if row else 'it has none'})"
    return FieldError(field, what, f"text in one of {', '.join(among)}")


def _boxed(text: str) -> str | None:
    found, how = answer_of(text, whole=True)
    return found if how == "boxed" else None


def _after_hashes(text: str) -> tuple[str, str | None]:
    """What stands before the last line, and the answer after `####` in it; None where there is none."""
    before, _, last = text.rpartition("\n")
    answer = last.strip().removeprefix("####").strip() if last.lstrip().startswith("####") else ""
    return before, (answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer) or None


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", dict: "an object", list: "a list", tuple: "a list", float: "no finite number"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
