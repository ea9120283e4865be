"""Read questions, extract answers and grade them."""

import dataclasses
import json
import pathlib
import tempfile

import pytest
from hypothesis import given, strategies

from rho1_jax.configs.default import EvalConfig
from rho1_jax.evals.answers import (
    GradedItem,
    Question,
    Questions,
    accuracy,
    answer_all,
    last_match,
    read_answered,
    read_questions,
)
from rho1_jax.runtime.errors import UserError


def json_objects():
    values = strategies.recursive(
        strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
        lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
        max_leaves=4,
    )
    keys = strategies.sampled_from(["index", "prompt", "generation", "extracted", "answer", "correct", "other"])
    return strategies.dictionaries(keys, values)


CONFIG = EvalConfig(
    prompt_template="Q: {question}\n",
    answer_pattern=r"A: (.*)",
    answer_key="answer",
    stops=("\nQ:",),
    max_new_tokens=8,
    generate_batch=2,
    tool_use=False,
)


def test_last_match_is_the_answer():
    assert last_match("A: 3 \nA: 42 \nmore", CONFIG.answer_pattern) == "42"
    assert last_match("no answer", CONFIG.answer_pattern) is None
    assert last_match("so 5\n#### 1,000", r"####\s*(.+)") == "1,000"


def test_records_become_prompts_and_answers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "2+2?", "answer": "S: easy\\nA: 4"}\n')
    (question,) = read_questions(path, CONFIG).items
    assert (question.prompt, question.answer) == ("Q: 2+2?\n", "4")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "x"}', ":2: missing keys: needs 'answer'; has 'question'"),
        ('{"question": "x", "answer": "4"}', ":2: config.eval.answer_pattern=.* finds no answer in '4'"),
    ],
)
def test_error_names_file_and_line_of_a_bad_question(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "1?", "answer": "A: 1"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"q.jsonl{message}"):
        read_questions(path, CONFIG)


def test_items_are_graded_by_exact_match(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(f'{{"question": "{n}", "answer": "A: {n}"}}\n' for n in range(3)))

    class FakeGenerator:
        def run(self, requests, **options):
            # The last request ends first.
            for number, prompt in reversed(requests):
                yield number, f"S: thinking\nA: {'1' if '1' in prompt else '0'}"

    questions = read_questions(path, CONFIG)
    results = list(answer_all(FakeGenerator(), questions, CONFIG))
    assert [result.index for result in results] == [2, 1, 0]
    assert [result.correct for result in results] == [False, True, True]
    assert accuracy(results) == 2 / 3
    assert [result.index for result in answer_all(FakeGenerator(), questions, CONFIG, answered={1})] == [2, 0]


def item(index, prompt, answer, **changes):
    fields = {"index": index, "prompt": prompt, "generation": "", "extracted": None, "answer": answer, "correct": False}
    return json.dumps(fields | changes)


QUESTIONS = Questions([Question("a", "1"), Question("b", "2"), Question("c", "3")], (), str, str.__eq__)


def test_answers_to_other_questions_are_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    assert read_answered(path, QUESTIONS) == []
    path.write_text(item(1, "b", "2") + '\n{"index": 0, "prom')
    assert read_answered(path, QUESTIONS) == [GradedItem(1, "b", "", None, "2", False)]
    for other in (item(0, "b", "2"), item(3, "b", "2"), item(-1, "c", "3"), item(1, "b", "1")):
        path.write_text(other + "\n")
        with pytest.raises(UserError, match="items.jsonl holds answers to other questions"):
            read_answered(path, QUESTIONS)


@pytest.mark.parametrize(
    "line, message",
    [
        ("[]", r":2: input should be an object, not \[\]"),
        ("null", r":2: input should be an object, not None"),
        ("{}", r":2: index: field required"),
        ('{"index": 0, "prom', r":2: not JSON"),
        ("", r":2: not JSON"),
        ("\0", r":2: not JSON"),
        ("[" * 100_000, r":2: not JSON: recursion limit"),
        (item(1, "b", "2", correct=5), r":2: correct: input should be a valid boolean, not 5"),
        (item(True, "b", "2"), r":2: index: input should be a valid integer, not True"),
        (item(1, "b", "2", extracted=3), r":2: extracted: input should be a valid string, not 3"),
        (item(1, "b", "2", generation="\ud800"), r":2: not JSON"),
        (item(0, "a", "1"), r":2: a second answer to the question with index 0; delete one of the lines"),
    ],
)
def test_error_names_file_and_line_of_a_bad_item(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text(f"{item(0, 'a', '1')}\n{line}\n{item(2, 'c', '3')}\n")
    with pytest.raises(UserError, match=f"items.jsonl{message}"):
        read_answered(path, QUESTIONS)


@pytest.mark.parametrize("end", ["", "\0" * 100, item(1, "b", "2")[:-20], "é"])
def test_last_line_that_was_cut_short_is_left_out(tmp_path, end):
    path = tmp_path / "items.jsonl"
    path.write_bytes((item(0, "a", "1") + "\n" + end).encode()[: -1 if end else None])
    assert [answered.index for answered in read_answered(path, QUESTIONS)] == [0]


@given(
    strategies.lists(
        strategies.one_of(
            strategies.builds(item, strategies.integers(-1, 3), strategies.sampled_from("abc"), strategies.just("1")),
            strategies.builds(lambda changes: json.dumps(json.loads(item(0, "a", "1")) | changes), json_objects()),
            strategies.text(),
        )
    ),
    strategies.booleans(),
)
def test_any_file_of_items_is_read_or_refused_in_one_line(lines, ended):
    """A file that is accepted holds answers to the questions, and each of them once."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "items.jsonl"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n" * ended)
        try:
            items = read_answered(path, QUESTIONS)
        except UserError as error:
            assert "\n" not in str(error)
            return
    assert len({answered.index for answered in items}) == len(items)
    assert all(QUESTIONS.items[i.index] == Question(i.prompt, i.answer) and i.correct in (0, 1) for i in items)


def test_generations_are_made_valid_text():
    class FakeGenerator:
        def run(self, requests, **options):
            for number, _ in requests:
                yield number, "a\ud800b\udcffc\0"

    results = list(answer_all(FakeGenerator(), dataclasses.replace(QUESTIONS, extract=lambda text: text), CONFIG))
    assert {(result.generation, result.extracted) for result in results} == {("a?b?c\0", "a?b?c\0")}


def test_bad_answer_pattern_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1?", "answer": "A: 1"}\n')
    for pattern, message in (("(", "missing \\)"), ("a", "must have exactly one group")):
        with pytest.raises(UserError, match=f"config.eval.answer_pattern='.*{message}"):
            read_questions(tmp_path / "q.jsonl", dataclasses.replace(CONFIG, answer_pattern=pattern))
