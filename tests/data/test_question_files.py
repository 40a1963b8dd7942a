"""S15: question files in three formats, with the names of real data sets; what is wrong with a row is said."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.config.prosetting import QuestionsConfig
from hpc_rl.data import question_files
from hpc_rl.data.question_fields import FieldError, normalise
from hpc_rl.data.question_files import BadRow, QuestionFile, QuestionFileError, Row, check_files, iter_rows

ROWS = [{"question": f"How many are {i} and {i}?", "answer": str(2 * i), "solution": f"{i}+{i}"} for i in range(5)]


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=2))


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_parquet(path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


Write = Callable[[Path, list[Any]], None]
FORMATS = [write_json, write_jsonl, write_parquet]


def said(path: Path, held_out: Path | None = None) -> str:
    return "\n".join(map(str, check_files(QuestionsConfig(file=path, held_out_file=held_out))))


def bad(path: Path) -> list[BadRow]:
    return [row for row in iter_rows(path) if isinstance(row, BadRow)]


@pytest.mark.parametrize("write", FORMATS)
def test_s15_the_three_formats_say_the_same_whatever_the_file_is_called(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "questions.txt", ROWS)
    rows = list(iter_rows(tmp_path / "questions.txt"))
    assert all(isinstance(row, Row) for row in rows)
    assert [(row.question, row.answer, row.solution) for row in rows if isinstance(row, Row)] == [
        tuple(row.values()) for row in ROWS
    ]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert said(tmp_path / "questions.txt") == ""


BOXED = r"It is $\frac{14}{3}$, so \boxed{\frac{14}{3}}."


@pytest.mark.parametrize(
    ("row", "question", "answer", "solution"),
    [
        ({"question": " What? ", "answer": 72}, "What?", "72", None),
        ({"id": 7, "Problem": "What?", "Final Answer": "5"}, "What?", "5", None),
        ({"question": "", "problem": "What?", "answer": None, "finalAnswer": ["5"]}, "What?", "5", None),
        ({"query": "What?", "target": 2.5, "rationale": "Because."}, "What?", "2.5", "Because."),
        ({"problem": "What?", "solution": BOXED, "level": "Level 5"}, "What?", r"\frac{14}{3}", BOXED),  # MATH
        ({"problem": "What?", "solution": BOXED, "answer": r"$\frac{14}{3}$"}, "What?", r"$\frac{14}{3}$", BOXED),
        (
            {"question": "What?", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 1,024"},  # GSM8K
            "What?", "1024", "Natalia sold 48/2 = 24 clips.\n\\boxed{1024}",
        ),
        ({"question": "What?", "answer": "#### 7"}, "What?", "7", None),
        ({"question": "What?", "answer": "why\n#### 7", "solution": "because"}, "What?", "7", "because"),
        ({"question": "What?", "answer": r"\boxed{(1,024)}"}, "What?", "(1,024)", None),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}],  # verl
             "reward_model": {"ground_truth": "34", "style": "rule"}},
            "What?", "34", None,
        ),
        ({"instruction": "Translate.", "input": "ja", "answer": "yes"}, "Translate.\n\nja", "yes", None),  # Alpaca
        ({"instruction": "What?", "input": "", "answer": "yes"}, "What?", "yes", None),
        ({"Body": "He has 2.", "Question": "How many?", "Answer": 2.0}, "He has 2. How many?", "2", None),  # SVAMP
    ],
)  # fmt: skip
def test_s15_fields_are_normalised(row: dict[str, Any], question: str, answer: str, solution: str | None) -> None:
    assert normalise(row) == (question, answer, solution)


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"text": "What?", "answer": "5"}, "question", "there is none among its fields (text, answer)"),
        ({"question": "  ", "prompt": None, "answer": "5"}, "question", "question and prompt are empty"),
        ({"question": "What?"}, "answer", "text in one of answer, final_answer, ground_truth"),
        ({"question": "What?", "solution": "No box."}, "answer", "there is none among its fields (question, solution)"),
        ({"question": "What?", "answer": True}, "answer", "True is true or false; expected text or a number"),
        ({"question": "What?", "answer": ["1", "2"]}, "answer", "['1', '2'] is a list"),
        ({"question": "What?", "answer": float("nan")}, "answer", "nan is no finite number"),
        ({"question": {"en": "What?"}, "answer": "5"}, "question", "{'en': 'What?'} is an object"),
        ({"question": "What\udcff?", "answer": "5"}, "question", "its bytes are not UTF-8"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "5"},
            "prompt", "a chat of user, assistant; expected one message of the user",
        ),
    ],
)  # fmt: skip
def test_s15_a_row_that_is_no_question_says_why(row: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        normalise(row)
    assert caught.value.field == field
    assert says in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["question", "Problem", "prompt", "input", "body", "answer", "solution", "reward_model", "x"])


@given(st.dictionaries(names, json_values, max_size=6))
def test_any_row_is_a_question_or_says_why_not(row: dict[str, Any]) -> None:
    try:
        question, answer, solution = normalise(row)
    except FieldError:
        return
    assert question.strip() == question != ""
    assert answer.strip() != ""
    assert solution is None or solution.strip() != ""


def test_s15_a_bad_row_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text('[\n {"question": "a", "answer": 1},\n\n {"question": "b"},\n 7]')
    assert said(path).splitlines()[:2] == [
        f"{path}: line 4: questions.file: answer: there is none among its fields (question)",
        "    expected: text in one of answer, final_answer, ground_truth, target, expected_answer, reference_answer, "
        "reference, gold",
    ]
    assert f"{path}: line 5: questions.file: '7' is no object" in said(path)
    path.write_text('{"question": "a", "answer": 1}\n\n{"question": "b", "answer": 2\n{"question": "c", "answer": 3}\n')
    assert said(path).startswith(f"{path}: line 3: questions.file: not JSON: ")
    write_parquet(path, [{"question": "a", "answer": "1"}, {"question": None, "answer": "2"}])
    assert said(path).startswith(f"{path}: row 2: questions.file: question: question is empty")


def test_s15_bytes_that_are_no_utf8_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(
        b'{"question": "a", "answer": 1}\n{"question": "b\xff", "answer": 2}\n{"question": "c", "answer": 3}\n'
    )
    assert [(row.place, row.field) for row in bad(path)] == [("line 2", "question")]
    path.write_bytes(b'\xef\xbb\xbf[{"question": "a", "answer": 1}]')
    assert [row.number for row in iter_rows(path) if isinstance(row, Row)] == [1]


def test_s15_the_first_bad_rows_are_said_at_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", [{"question": f"{i}"} for i in range(100)])
    lines = [line for line in said(tmp_path / "q.jsonl").splitlines() if not line.startswith("    ")]
    assert len(lines) == 21
    assert lines[19].startswith(f"{tmp_path}/q.jsonl: line 20: ")
    assert lines[20] == f"questions.file: 80 more bad rows in {tmp_path}/q.jsonl"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("question,answer\na,b\n", "begins with b'question,ans'"),
        ("\x1f\x8b\x08", "not compressed"),
        ('[{"question": "a", "answer": 1}', "line 1: the list does not end"),
        ('[\n{"question": "a", "answer": 1}\n{"question": "b", "answer": 1}]', "line 3: '{' after an element"),
        ('[{"question": "a", "answer": 1},\n{"question": "b, "answer": 1}]', "line 2: not JSON"),
        ('[{"question": "a", "answer": 1}]\n[]', "line 2: there is more after the list"),
        ("[" * 200_000, "line 1: not JSON: too deep"),
        ("PAR1 and no more", "expected a whole parquet file"),
    ],
)
def test_s15_what_is_no_whole_file_says_so(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "q").write_text(text)
    assert says in said(tmp_path / "q")
    with pytest.raises(QuestionFileError, match=str(tmp_path / "q")):
        list(iter_rows(tmp_path / "q"))


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    assert f"{tmp_path}/q: No such file or directory; expected a JSON list" in said(tmp_path / "q")
    assert "Is a directory" in said(tmp_path)


@given(
    st.lists(
        st.fixed_dictionaries({"question": st.text('ab \n"\\é{[', min_size=1), "answer": st.integers()})
        | st.integers(100, 999),
        max_size=6,
    ),
    st.sampled_from([None, 0, 3]),
    st.integers(1, 40),
)
def test_s15_a_list_is_read_in_pieces_of_any_size(rows: list[Any], indent: int | None, chunk: int) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    read = list(_with_chunks(text, chunk))
    assert [element for _, element in read] == [
        str(row) if isinstance(row, int) else {**row, "answer": str(row["answer"])} for row in rows
    ]
    lines = text.split("\n")
    for (place, _), row in zip(read, rows, strict=True):
        begins = str(row) if isinstance(row, int) else "{"
        assert begins in lines[int(place.removeprefix("line ")) - 1]


def _with_chunks(text: str, chunk: int) -> Any:
    import io

    before, question_files.CHUNK = question_files.CHUNK, chunk
    try:
        yield from question_files._json_list(Path("q.json"), io.StringIO(text, newline="\n"))
    finally:
        question_files.CHUNK = before


@pytest.mark.parametrize("write", FORMATS)
def test_s15_a_file_is_not_held_in_memory(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "q", [{"question": f"{i} " + "long " * 2000, "answer": i} for i in range(2000)])
    tracemalloc.start()
    try:
        assert sum(isinstance(row, Row) for row in iter_rows(tmp_path / "q")) == 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (15e6 if write is write_parquet else 6e6)  # of 20 MB; a batch of parquet is 1024 rows


def test_s15_a_question_that_comes_twice_counts_once(tmp_path: Path) -> None:
    rows = [("A  b", 1), ("c", 1), ("a\nB", 1), ("C", 2), ("d", 1)]
    write_jsonl(tmp_path / "q", [{"question": question, "answer": answer} for question, answer in rows])
    file = QuestionFile(tmp_path / "q")
    assert (len(file.keys), file.duplicates_number, file.contradictions, file.bad_number) == (3, 2, 1, 0)
    assert [(one.place, one.earlier, one.same_answer) for one in file.duplicates] == [
        ("line 3", "line 1", True),
        ("line 4", "line 2", False),
    ]
    assert said(tmp_path / "q") == ""


def test_a_run_needs_a_question_for_each_of_its_sets(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q", ROWS[:2])
    write_jsonl(tmp_path / "held_out", ROWS[2:])
    assert "has 2 different questions\n    expected: at least 3: 1 to train on, 1 for validation, 1 held out" in said(
        tmp_path / "q"
    )
    assert said(tmp_path / "q", tmp_path / "held_out") == ""
    write_jsonl(tmp_path / "q", ROWS[:1])
    assert "has 1 different question\n    expected: at least 2" in said(tmp_path / "q", tmp_path / "held_out")


def test_a_held_out_question_must_not_be_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q", ROWS)
    write_jsonl(
        tmp_path / "held_out", [{"question": "Other?", "answer": 1}, {"problem": "how many ARE 3 and 3?", "answer": 6}]
    )
    problems = said(tmp_path / "q", tmp_path / "held_out")
    assert "questions.held_out_file: 1 of its questions are to be trained on as well" in problems
    assert "line 2 = line 4" in problems
    (tmp_path / "held_out").write_text("[]")
    assert "has no questions" in said(tmp_path / "q", tmp_path / "held_out")
