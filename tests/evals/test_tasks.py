"""Reading the math tasks and making prompts of them."""

import json

import pytest
from helpers import root

from rho1_jax.evals.extraction import extract
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import TASKS, Exemplar, read_exemplars, read_items
from rho1_jax.runtime.errors import UserError

DATA = root().parent / "shared" / "data" / "eval"
COUNTS = {"gsm8k": 1319, "math": 5000, "math_oai": 500, "svamp": 1000, "asdiv": 2215, "mawps": 2065, "tabmwp": 1000,
          "mathqa": 1000, "mmlu_stem": 3018, "sat_math": 32, "gsm_hard": 1319}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_item_of_the_published_files_is_read(name):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: the tasks' files were not read")
    items = read_items(name, DATA)
    assert len(items) == COUNTS[name]
    assert all(item.question.strip() and item.answer.strip() for item in items)
    if TASKS[name].kind == "choice":
        for item in items:
            assert f"({item.answer}) " in item.question.split("Answer Choices: ")[1], item


@pytest.mark.parametrize("name", TASKS)
def test_exemplars_end_in_answers_that_are_read_from_them(name):
    task, exemplars = TASKS[name], read_exemplars(name, None)
    assert len(exemplars) == task.shots == (4 if name in ("math", "math_oai", "mathqa", "mmlu_stem", "sat_math") else 8)
    for exemplar in exemplars:
        answer = extract(exemplar.solution, task.kind)
        assert answer and len(answer) < 25, exemplar
        if task.kind == "choice":
            assert f"({answer}) " in exemplar.question


RECORDS = {
    "gsm8k": ({"question": "q", "answer": "1+1\n#### 1,002"}, "q", "1002"),
    "math": ({"problem": "p", "solution": r"so \boxed{\frac{1}{2}}."}, "p", r"\frac{1}{2}"),
    "math_oai": ({"problem": "p", "solution": "", "answer": "3"}, "p", "3"),
    "svamp": ({"Body": "Two apples", "Question": "How many?", "Answer": 2.0}, "Two apples. How many?", "2"),
    "asdiv": ({"body": "b", "question": "q", "answer": "9 (apples)"}, "b q", "9"),
    "mawps": ({"input": "q", "target": 2.5}, "q", "2.5"),
    "mathqa": (
        {"problem": "p", "options": "a ) 1 , 000 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "b"},
        "p\nAnswer Choices: (A) 1 , 000 (B) 2 (C) 3 (D) 4 (E) 5",
        "B",
    ),
    "mmlu_stem": (
        {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 2},
        "q\nAnswer Choices: (A) w (B) x (C) y (D) z",
        "C",
    ),
    "sat_math": (
        {"question": "q", "options": "A) $1$ B) $2$ C) $3$ D) $4$", "Answer": "D"},
        "q\nAnswer Choices: (A) $1$ (B) $2$ (C) $3$ (D) $4$",
        "D",
    ),
    "gsm_hard": ({"input": "q", "target": -3431580.0}, "q", "-3431580"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_as_an_item(name, tmp_path):
    record, question, answer = RECORDS[name]
    path = tmp_path / TASKS[name].file
    path.parent.mkdir()
    path.write_text(json.dumps(record) + "\n")
    assert read_items(name, tmp_path) == [(question, answer)]


def test_a_table_is_put_with_its_question(tmp_path):
    record = {"table_title": "Goals", "table": "a | 1", "question": "How many?", "unit": "goals", "choices": ["1", "2"],
              "answer": "1"}  # fmt: skip
    (tmp_path / "tabmwp").mkdir()
    (tmp_path / TASKS["tabmwp"].file).write_text(json.dumps({"7": record}))
    (item,) = read_items("tabmwp", tmp_path)
    for part in ('regarding "Goals"', "a | 1\nHow many?", "(Unit: goals)", "options: 1, 2"):
        assert part in item.question
    assert item.answer == "1"


def test_prompts():
    shots = [Exemplar("1+1?", "The answer is 2.")]
    assert TASKS["gsm8k"].prompt("2+2?", shots) == "Question: 1+1?\nAnswer: The answer is 2.\n\nQuestion: 2+2?\nAnswer:"
    assert TASKS["math"].prompt("p", shots).endswith("The answer is 2.\n\nProblem:\np\n\nSolution:\n")


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json\n", r"test.jsonl:1: no record of task gsm8k"),
        ('{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n', r"test.jsonl:2: no record of task gsm8k"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(text, message, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_items("gsm8k", tmp_path)
    with pytest.raises(UserError, match=r"svamp/test.jsonl: no such file"):
        read_items("svamp", tmp_path)
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp" / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"svamp/test.jsonl: no records of task svamp"):
        read_items("svamp", tmp_path)


def test_exemplars_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n}?", "solution": f"The answer is {n}."}) + "\n" for n in range(5))
    )
    assert [shot.question for shot in read_exemplars("mathqa", str(path))] == ["0?", "1?", "2?", "3?"]
    with pytest.raises(UserError, match="task gsm8k needs 8 exemplars; .* has 5"):
        read_exemplars("gsm8k", str(path))
    path.write_text('{"question": "q"}\n')
    with pytest.raises(UserError, match="--exemplars=mathqa="):
        read_exemplars("mathqa", str(path))


def test_answers_of_asdiv_are_graded_as_they_are_given():
    with Grader() as grader:
        for right, answer in (("Mrs. Hilt", "Mrs. Hilt"), ("5", "5 apples"), ("1/2", "0.5")):
            assert grader.equal(answer, right)
