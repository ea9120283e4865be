"""Read questions, extract answers and grade them."""

import pytest

from rho1_jax.configs.default import EvalConfig
from rho1_jax.evals.answers import (
    Question,
    Questions,
    accuracy,
    answer_all,
    last_match,
    read_answered,
    read_questions,
)
from rho1_jax.runtime.errors import UserError

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
    assert [result["index"] for result in results] == [2, 1, 0]
    assert [result["correct"] for result in results] == [False, True, True]
    assert accuracy(results) == 2 / 3
    assert [result["index"] for result in answer_all(FakeGenerator(), questions, CONFIG, answered={1})] == [2, 0]


def test_answers_to_other_questions_are_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    questions = Questions([Question("a", "1"), Question("b", "2")], (), str, str.__eq__)
    path.write_text('{"index": 1, "prompt": "b"}\n{"index": 0, "prom')
    assert read_answered(path, questions) == [{"index": 1, "prompt": "b"}]
    for other in ('{"index": 0, "prompt": "b"}\n', '{"index": 2, "prompt": "b"}\n', '{"prompt": "a"}\n'):
        path.write_text(other)
        with pytest.raises(UserError, match="items.jsonl holds answers to other questions"):
            read_answered(path, questions)
