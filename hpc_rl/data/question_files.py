"""Question files: JSON list, JSONL or parquet, told apart by how they begin, read row by row (S15).

A file is never held in memory as a whole, so that `launch` may look through 100 000 questions on a login node. What is
wrong with a row is said with the file and the line where it begins; in parquet, which has no lines, with its row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hpc_rl.config.errors import Problem
from hpc_rl.config.prosetting import QuestionsConfig
from hpc_rl.data import question_fields
from hpc_rl.data.question_fields import FieldError
from hpc_rl.data.questions import text_key

SHOWN = 20
"""Bad rows, duplicates and leaks that a message names."""
CHUNK = 1 << 20
"""Characters that are read at once."""
LONGEST = 1 << 24
"""Characters of one element of a JSON list; what is longer is no question."""
BATCH = 1024
"""Rows of a parquet file in memory."""

FORMATS = "a JSON list of objects, JSONL (one object a line) or parquet"
_SPACE = re.compile(r"[ \t\r\n]*")


class QuestionFileError(ValueError):
    """A question file that the run cannot begin with; the message names file and line, and what was expected."""


@dataclass(frozen=True)
class Row:
    """A question of a file: its number, from 1, where it stands (`line 7`, `row 7`), and what it says."""

    number: int
    place: str
    question: str
    answer: str
    solution: str | None


@dataclass(frozen=True)
class BadRow:
    """A row that is no question, and why."""

    number: int
    place: str
    field: str
    what: str
    expected: str


@dataclass(frozen=True)
class Duplicate:
    """A row whose question stands in an earlier row; `same_answer` says whether both have the same answer."""

    place: str
    earlier: str
    same_answer: bool


def iter_rows(path: Path) -> Iterator[Row | BadRow]:
    """All rows of a file, in order, as the tables of `question_fields` read them.

    Raises
    ------
    QuestionFileError
        When there is no such file, or it is none of the three formats, or is not whole.
    """
    for number, (place, raw) in enumerate(_raw_rows(path), 1):
        if isinstance(raw, json.JSONDecodeError):
            yield BadRow(number, place, "", f"not JSON: {raw.msg} at character {raw.pos + 1}", "one JSON object a line")
        elif not isinstance(raw, Mapping):
            yield BadRow(number, place, "", f"{str(raw)[:60]!r} is no object", '{"question": …, "answer": …}')
        else:
            try:
                yield Row(number, place, *question_fields.normalise(raw))
            except FieldError as error:
                yield BadRow(number, place, error.field, error.what, error.expected)


class QuestionFile:
    """What a look through a question file found: its questions by key, its duplicates, its bad rows.

    Attributes
    ----------
    keys
        `text_key` of each question → number and place of the row that has it first; about 200 bytes a question.
    duplicates, bad
        Rows that are left out, and rows that are no questions. Of each the first `SHOWN` are kept.
    duplicates_number, contradictions, bad_number
        How many there are; contradictions are duplicates with another answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[bytes, tuple[int, str]] = {}
        self.duplicates: list[Duplicate] = []
        self.bad: list[BadRow] = []
        self.duplicates_number = self.contradictions = self.bad_number = 0
        answers: dict[bytes, int] = {}
        for row in iter_rows(path):
            if isinstance(row, BadRow):
                self.bad_number += 1
                if len(self.bad) < SHOWN:
                    self.bad.append(row)
                continue
            key = text_key(row.question)
            earlier = self.keys.setdefault(key, (row.number, row.place))
            if earlier[0] == row.number:
                answers[key] = hash(row.answer)
                continue
            same = answers[key] == hash(row.answer)
            self.duplicates_number += 1
            self.contradictions += not same
            if len(self.duplicates) < SHOWN:
                self.duplicates.append(Duplicate(row.place, earlier[1], same))

    def problems(self, field: str) -> Iterator[Problem]:
        """Its bad rows, the first ones by name."""
        for row in self.bad:
            where = f"{self.path}: {row.place}"
            yield Problem(field, f"{row.field}: {row.what}" if row.field else row.what, row.expected, where=where)
        if self.bad_number > len(self.bad):
            what = f"{self.bad_number - len(self.bad)} more bad rows in {self.path}"
            yield Problem(field, what, way_out="correct the rows, or remove them")


def check_files(questions: QuestionsConfig) -> Iterator[Problem]:
    """Why the run cannot begin with these files: bad rows, too few questions, held-out questions to be trained on."""
    yield from look_through(questions)[1]


def check_there(questions: QuestionsConfig) -> Iterator[Problem]:
    """Files that are missing, cannot be opened or are no text: whatever is seen without reading their rows."""
    for field, path in (("questions.file", questions.file), ("questions.held_out_file", questions.held_out_file)):
        try:
            if path is not None:
                next(iter_rows(path), None)
        except QuestionFileError as error:
            yield Problem(field, str(error), way_out="correct the path or the file")


def look_through(questions: QuestionsConfig) -> tuple[list[QuestionFile], list[Problem]]:
    """What the files have in them, the held-out one last if there is one; and every reason not to begin with that."""
    files: list[QuestionFile] = []
    problems: list[Problem] = []
    for field, path in (("questions.file", questions.file), ("questions.held_out_file", questions.held_out_file)):
        if path is None:
            continue
        try:
            files.append(QuestionFile(path))
        except QuestionFileError as error:
            problems.append(Problem(field, str(error), way_out="correct the path or the file"))
        else:
            problems += files[-1].problems(field)
    if problems:
        return files, problems
    least, why = fewest(questions)
    if (number := len(files[0].keys)) < least:
        what = f"{questions.file} has {number} different question{'' if number == 1 else 's'}"
        problems.append(Problem("questions.file", what, f"at least {least}: {why}"))
    if len(files) == 2:
        if not files[1].keys:
            problems.append(Problem("questions.held_out_file", f"{files[1].path} has no questions", "at least 1"))
        problems += _leaks(*files)
    return files, problems


def fewest(questions: QuestionsConfig) -> tuple[int, str]:
    """How many questions a run needs at least, and what for."""
    if questions.held_out_file is None:
        return 3, "1 to train on, 1 for validation, 1 held out (or name questions.held_out_file)"
    return 2, "1 to train on, 1 for validation"


def _leaks(training: QuestionFile, held_out: QuestionFile) -> Iterator[Problem]:
    both = [key for key in held_out.keys if key in training.keys]
    if both:
        shown = ", ".join(f"{held_out.keys[key][1]} = {training.keys[key][1]}" for key in both[:SHOWN])
        more = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
        yield Problem(
            "questions.held_out_file",
            f"{len(both)} of its questions are to be trained on as well: "
            f"{held_out.path} = {training.path}: {shown}{more}",
            "held-out questions that are in no other file",
            "remove them from one of the two files",
        )


def _raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row's place and what stands there, by the format that the file begins like."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise QuestionFileError(f"{path}: {error.strerror or error}; expected {FORMATS}") from error
    if head.startswith(b"PAR1"):
        yield from _parquet(path)
        return
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if begins not in (b"[", b"{"):
        what = "is empty" if not head.strip() else f"begins with {head[:12]!r}"
        raise QuestionFileError(f"{path} {what}; expected {FORMATS}, not compressed, in UTF-8")
    # surrogateescape: bytes that are no UTF-8 are found in the row where they are, which then is named
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as text:
        yield from _json_list(path, text) if begins == b"[" else _json_lines(text)


# Numbers are kept as they are written: 72.50 is no 72.5 where answers are compared as text.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)


def _json_lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", _DECODER.decode(line)
        except json.JSONDecodeError as error:
            yield f"line {number}", error
        except RecursionError:
            yield f"line {number}", json.JSONDecodeError("nested too deeply", "", 0)


def _json_list(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    """Elements of a list that is read in chunks; one that is not whole yet is tried again with the next chunk."""
    text, at, line, ended = "", 0, 1, False

    def more() -> bool:
        nonlocal text, at, ended
        new = "" if ended or len(text) - at > LONGEST else file.read(max(CHUNK, len(text) - at))
        text, at, ended = text[at:] + new, 0, ended or not new
        return bool(new)

    def look() -> str:
        """The next character that is no space; "" at the end."""
        nonlocal at, line
        while True:
            match = _SPACE.match(text, at)
            assert match is not None, "no space is a match as well"
            line += text.count("\n", at, match.end())
            at = match.end()
            if at < len(text):
                return text[at]
            if not more():
                return ""

    def fault(what: str, place: int) -> QuestionFileError:
        return QuestionFileError(f"{path}: line {line + text.count(chr(10), at, place)}: {what}; expected {FORMATS}")

    first = look()
    assert first == "[", "the file was seen to begin so"
    at += 1
    if look() == "]":
        at += 1
    else:
        while True:
            look()
            try:
                element, end = _DECODER.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                if more():
                    continue
                msg, place = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else ("too deep", at)
                raise fault(f"not JSON: {msg}", place) from error
            if end == len(text) and more():
                continue  # a number may go on in the next chunk
            yield f"line {line}", element
            line += text.count("\n", at, end)
            at = end
            mark = look()
            if mark not in (",", "]"):
                raise fault(f"{mark!r} after an element" if mark else "the list does not end", at)
            at += 1
            if mark == "]":
                break
    if look():
        raise fault("there is more after the list", at)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise QuestionFileError(
            f"{path}: to read parquet, pyarrow must be installed here too (pip install pyarrow); or give JSONL"
        ) from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pa.ArrowException as error:
        raise QuestionFileError(f"{path}: row {number + 1}: {error}; expected a whole parquet file") from error
