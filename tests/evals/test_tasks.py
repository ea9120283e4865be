"""Read the math tasks and build their prompts."""

import dataclasses
import hashlib
import json

import pytest
from helpers import root

from rho1_jax.evals.extraction import extract
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import PROBLEM_SOLUTION, TASKS, Exemplar, Item, Task, read_exemplars, read_items
from rho1_jax.runtime.errors import UserError

DATA = root().parent / "shared" / "data" / "eval"
COUNTS = {"gsm8k": 1319, "math": 5000, "math_oai": 500, "svamp": 1000, "asdiv": 2215, "mawps": 2065, "tabmwp": 1000,
          "mathqa": 1000, "mmlu_stem": 3018, "sat_math": 32, "gsm_hard": 1319}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_all_published_items_are_read(name):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: cannot read the tasks' files")
    items = read_items(name, DATA)
    assert len(items) == COUNTS[name]
    assert all(item.question.strip() and item.answer.strip() for item in items)
    if TASKS[name].kind == "choice":
        for item in items:
            assert f"({item.answer}) " in item.question.split("Answer Choices: ")[1], item


@pytest.mark.parametrize("name", TASKS)
def test_answers_can_be_extracted_from_exemplars(name):
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
def test_record_becomes_an_item(name, tmp_path):
    record, question, answer = RECORDS[name]
    path = tmp_path / TASKS[name].file
    path.parent.mkdir()
    path.write_text(json.dumps(record) + "\n")
    assert read_items(name, tmp_path) == [(question, answer)]


def test_tabmwp_question_includes_its_table(tmp_path):
    record = {"table_title": "Goals", "table": "a | 1", "question": "How many?", "unit": "goals", "choices": ["1", "2"],
              "answer": "1"}  # fmt: skip
    (tmp_path / "tabmwp").mkdir()
    (tmp_path / TASKS["tabmwp"].file).write_text(json.dumps({"7": record}))
    (item,) = read_items("tabmwp", tmp_path)
    for part in ('regarding "Goals"', "a | 1\nHow many?", "(Unit: goals)", "options: 1, 2"):
        assert part in item.question
    assert item.answer == "1"


def test_prompt_forms():
    shots = [Exemplar("1+1?", "The answer is 2.")]
    assert TASKS["gsm8k"].prompt("2+2?", shots) == "Question: 1+1?\nAnswer: The answer is 2.\n\nQuestion: 2+2?\nAnswer:"
    assert TASKS["math"].prompt("p", shots).endswith("The answer is 2.\n\nProblem:\np\n\nSolution:\n")


PROMPT_HASHES = {
    "gsm8k": "4f552f83d34ca490",
    "math": "b03f62258e2f3431",
    "math_oai": "b03f62258e2f3431",
    "svamp": "4f552f83d34ca490",
    "asdiv": "4f552f83d34ca490",
    "mawps": "4f552f83d34ca490",
    "tabmwp": "7025c22764cfecf7",
    "mathqa": "dba19e1c309c3073",
    "mmlu_stem": "b1ace23ea32c31c8",
    "sat_math": "6ffd756ab8cc8e20",
    "gsm_hard": "4f552f83d34ca490",
}


@pytest.mark.parametrize("name", PROMPT_HASHES)
def test_prompts_do_not_change(name):
    """Accuracies are comparable only while every byte of a task's prompt stays the same."""
    prompt = TASKS[name].prompt("2 + 2?", read_exemplars(name, None))
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == PROMPT_HASHES[name]


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json\n", r"test.jsonl:1: not a record of task gsm8k"),
        ('{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n', r"test.jsonl:2: not a record of task gsm8k"),
        ("[]\n", r"test.jsonl:1: not a record of task gsm8k: input should be an object"),
        ('{"question": "q", "ans', r"test.jsonl:1: not a record of task gsm8k: not JSON"),
        ("[" * 100_000, r"test.jsonl:1: not a record of task gsm8k: not JSON: recursion limit"),
        ('{"question": 5, "answer": "#### 1"}', r"test.jsonl:1: not a record of task gsm8k: .*must be text"),
        ('{"question": "\\ud800", "answer": "#### 1"}', r"test.jsonl:1: not a record of task gsm8k: not JSON"),
    ],
)
def test_error_names_file_and_line_of_a_bad_record(text, message, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_items("gsm8k", tmp_path)
    with pytest.raises(UserError, match=r"svamp/test.jsonl: no such file"):
        read_items("svamp", tmp_path)
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp" / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"svamp/test.jsonl: holds no records for task svamp"):
        read_items("svamp", tmp_path)


@pytest.mark.parametrize(
    "name, record, message",
    [
        ("gsm_hard", '{"input": "q", "target": 1e999}', "not JSON|OverflowError"),
        ("svamp", '{"Body": "b", "Question": "q", "Answer": NaN}', "not JSON|ValueError"),
        ("math", '{"problem": "p", "solution": "1", "answer": 1}', "must be text"),
        ("mathqa", '{"problem": "p", "options": "[(", "correct": "a"}', "SyntaxError"),
        ("mathqa", '{"problem": "p", "options": "a ) 1 , b ) 2", "correct": "c"}', "right answer is 'C', of 2 choices"),
        ("mathqa", '{"problem": "p", "options": "a ) 1 , b ) 2", "correct": ""}', "right answer is '', of 2 choices"),
        ("mmlu_stem", '{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 4}', "right answer is 'E', of 4"),
        ("mmlu_stem", '{"question": "q", "choices": ["1", "2", "3", "4"], "answer": -1}', "right answer is 'E', of 4"),
        ("mmlu_stem", '{"question": "q", "choices": ["1", "2", "3", "4", "5", "6"], "answer": 0}', "of 6 choices"),
    ],
)
def test_record_whose_right_answer_cannot_be_right_is_refused(name, record, message, tmp_path):
    path = tmp_path / TASKS[name].file
    path.parent.mkdir()
    path.write_text(record + "\n")
    with pytest.raises(UserError, match=f"test.jsonl:1: not a record of task {name}: .*(?:{message})"):
        read_items(name, tmp_path)


def test_error_names_the_key_of_a_bad_record_in_a_json_object(tmp_path):
    path = tmp_path / TASKS["tabmwp"].file
    path.parent.mkdir()
    for content, message in (("[]", "an object"), ('{"7": []}', "7: input should"), ('{"7": {}}', ": 7: not a")):
        path.write_text(content)
        with pytest.raises(UserError, match=f"problems_test1k.json: .*{message}|problems_test1k.json{message}"):
            read_items("tabmwp", tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="problems_test1k.json: not JSON"):
        read_items("tabmwp", tmp_path)


@pytest.mark.parametrize("line", ["[]", "3", '{"question": 1, "solution": "s"}', "[" * 100_000, '{"question": "q'])
def test_error_names_file_and_line_of_a_bad_exemplar(line, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "q", "solution": "s"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"--exemplars=mathqa=.*mine.jsonl:2: "):
        read_exemplars("mathqa", str(path))
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"--exemplars=mathqa=.*mine.jsonl:1: "):
        read_exemplars("mathqa", str(path))


def test_exemplars_from_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n}?", "solution": f"The answer is {n}."}) + "\n" for n in range(5))
    )
    assert [shot.question for shot in read_exemplars("mathqa", str(path))] == ["0?", "1?", "2?", "3?"]
    with pytest.raises(UserError, match="task gsm8k needs 8 exemplars; .* has only 5"):
        read_exemplars("gsm8k", str(path))
    path.write_text('{"question": "q"}\n')
    with pytest.raises(UserError, match="--exemplars=mathqa="):
        read_exemplars("mathqa", str(path))


def test_task_from_outside_the_package(tmp_path, monkeypatch):
    (tmp_path / "items.jsonl").write_text('{"q": "2+2?", "a": "4"}\n')
    own = Task("items.jsonl", "math", lambda record: Item(record["q"], record["a"]), shots=1, form=PROBLEM_SOLUTION)
    monkeypatch.setitem(TASKS, "own", own)
    (item,) = read_items("own", tmp_path)
    with pytest.raises(UserError, match="task own has no exemplars of its own and needs 1; give --exemplars=own=FILE"):
        read_exemplars("own", None)
    (tmp_path / "shots.jsonl").write_text('{"question": "1+1?", "solution": "The answer is 2."}\n')
    shots = read_exemplars("own", str(tmp_path / "shots.jsonl"))
    assert own.prompt(item.question, shots) == (
        "Problem:\n1+1?\n\nSolution:\nThe answer is 2.\n\nProblem:\n2+2?\n\nSolution:\n"
    )
    monkeypatch.setitem(TASKS, "own", dataclasses.replace(own, shots=0))
    assert read_exemplars("own", None) == []
    monkeypatch.setitem(TASKS, "own", dataclasses.replace(own, exemplars="typo"))
    with pytest.raises(UserError, match="task own: no exemplars 'typo': .*; give --exemplars=own=FILE"):
        read_exemplars("own", None)


def test_asdiv_answers_are_graded_without_their_unit():
    with Grader() as grader:
        for right, answer in (("Mrs. Hilt", "Mrs. Hilt"), ("5", "5 apples"), ("1/2", "0.5")):
            assert grader.equal(answer, right)
