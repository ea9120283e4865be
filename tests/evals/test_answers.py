"""Reading questions, extracting answers, grading."""

import pytest

from rho1_jax.evals.answers import (
    AnswerConfig,
    Question,
    Questions,
    accuracy,
    answer_all,
    extract,
    read_answered,
    read_questions,
)
from rho1_jax.runtime.errors import UserError

CONFIG = AnswerConfig(
    prompt_template="Q: {question}\n",
    answer_pattern=r"A: (.*)",
    answer_key="answer",
    stops=("\nQ:",),
    max_new_tokens=8,
    generate_batch=2,
    tool_use=False,
)


def test_the_last_match_is_the_answer():
    assert extract("A: 3 \nA: 42 \nmore", CONFIG.answer_pattern) == "42"
    assert extract("no answer", CONFIG.answer_pattern) is None
    assert extract("so 5\n#### 1,000", r"####\s*(.+)") == "1,000"


def test_questions_become_prompts_and_right_answers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "2+2?", "answer": "S: easy\\nA: 4"}\n')
    (question,) = read_questions(path, CONFIG).items
    assert (question.prompt, question.answer) == ("Q: 2+2?\n", "4")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "x"}', ":2: lacks the key 'answer'"),
        ('{"question": "x", "answer": "4"}', ":2: .* finds no answer"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "1?", "answer": "A: 1"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"q.jsonl{message}"):
        read_questions(path, CONFIG)


def test_items_are_graded_by_exact_match(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(f'{{"question": "{n}", "answer": "A: {n}"}}\n' for n in range(3)))

    class FakeGenerator:
        def run(self, requests, **options):
            # The last one ends first.
            for number, prompt in reversed(requests):
                yield number, f"S: thinking\nA: {'1' if '1' in prompt else '0'}"

    questions = read_questions(path, CONFIG)
    results = list(answer_all(FakeGenerator(), questions, CONFIG))
    assert [result["index"] for result in results] == [2, 1, 0]
    assert [result["correct"] for result in results] == [False, True, True]
    assert accuracy(results) == 2 / 3
    assert [result["index"] for result in answer_all(FakeGenerator(), questions, CONFIG, answered={1})] == [2, 0]


def test_items_of_other_questions_are_not_taken_for_these(tmp_path):
    path = tmp_path / "items.jsonl"
    questions = Questions([Question("a", "1"), Question("b", "2")], (), str, str.__eq__)
    path.write_text('{"index": 1, "prompt": "b"}\n{"index": 0, "prom')
    assert read_answered(path, questions) == [{"index": 1, "prompt": "b"}]
    for other in ('{"index": 0, "prompt": "b"}\n', '{"index": 2, "prompt": "b"}\n', '{"prompt": "a"}\n'):
        path.write_text(other)
        with pytest.raises(UserError, match="items.jsonl is of other questions"):
            read_answered(path, questions)
