"""Extract and grade answers: on examples written by hand, and against the verdicts that Rho-1 published."""

import json
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest
from helpers import environment, root, run_command

from rho1_jax.evals.answer_text import normalize
from rho1_jax.evals.extraction import extract, last_boxed, last_number
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import TASKS
from rho1_jax.grade import grade
from rho1_jax.runtime.errors import UserError

CASES = [
    json.loads(line) for line in (pathlib.Path(__file__).parent / "cases" / "grading.jsonl").read_text().splitlines()
]
PUBLISHED = root().parent / "shared" / "data" / "published"


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so 3 + 4 = 7 apples. The answer is 7.", "7"),
        ("The answer is $18.", "$18"),
        ("The answer is: 1,234\nQuestion: next", "1,234"),
        ("The answer is 3. No, the answer is 4.", "4"),
        (r"thus $\boxed{\frac{1}{2}}$ and done 99", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{\sqrt{2}}", r"\sqrt{2}"),
        (r"\boxed 5 is it", "5"),
        (r"\boxed{(1, 2", "(1, 2"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        (r"\boxed{3}. Final Answer: The final answer is $4$. I hope it is correct.", "4"),
        (r"The final answer is $\$10$. I hope it is correct.", r"\$10"),
        ("The final answer is $3$.\nNo. The final answer is $4$. I hope it is correct.", None),
        # Not in the format of the prompt: the rest of the line is kept as it stands.
        ("The final answer is 72. I hope it is correct.", "72. I hope it is correct"),
        ("it costs $1,200 and 35 cents", "35"),
        ("worth $1,234,567.", "1234567"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_extract_formula_or_number(text, answer):
    assert extract(text, "math") == answer


@pytest.mark.parametrize(
    "text, letter",
    [
        ("so it is 60. The answer is (C).", "C"),
        ("The answer is B", "B"),
        ("the answer is c", "C"),
        ("(A) is wrong. The answer is (D) 15", "D"),
        ("The answer is what I said: (C)", "C"),
        ("The answer is (B), not (C).", "B"),
        ("It must be (B).", "B"),
        ("nothing of the kind", None),
        # MathQA's own solutions end like this.
        ("x = log 12 answer : a", "A"),
        ('3 / 2 3 : 2 answer : d"', "D"),
        ("Answer: **B**", "B"),
        ("ans: (c)", "C"),
        ("the answer is option e.", "E"),
        ("answer : a\nanswer : b", "B"),
        ("the answer is a number", None),
        ("a man, a plan", None),
    ],
)
def test_extract_letter(text, letter):
    assert extract(text, "choice") == letter


def test_last_boxed_and_last_number():
    assert last_boxed("no box") is None and last_boxed(r"\fbox{a{b}c} d") == "a{b}c"
    assert last_number("from 5 to -3.5") == "-3.5"


EQUAL = [
    ("7", "7.0"), ("1,234", "1234"), ("$18", "18"), ("50\\%", "50"), ("0.5", "\\frac{1}{2}"), (".5", "0.5"),
    ("1/2", "\\frac12"), ("\\dfrac{3}{4}", "\\frac{3}{4}"), ("5 dollars", "5"), ("10\\text{ cm}^2", "10"),
    ("90^\\circ", "90"), ("x=3", "3"), ("\\text{Evelyn}", "evelyn"), ("0.3333", "\\frac{1}{3}"), ("25\\%", "0.25"),
    ("(1,2)", "(1, 2)"), ("(-\\infty, 0]", "(-\\infty,0]"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("2\\sqrt{3}", "\\sqrt{12}"), ("x^2+2x+1", "(x+1)^2"), ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
    ("1000(26)", "26000"), ("3\\\\sqrt{13}", "3\\sqrt{13}"), ("6-5i", "-5i+6"), ("1, 2, 3", "1,2,3"),
    ("\\begin{pmatrix} 1/2 \\\\ 3 \\end{pmatrix}", "\\begin{pmatrix}\\frac{1}{2}\\\\3\\end{pmatrix}"),
    ("y = 2x + 1", "y=1+2x"), ("\\{1,2\\}", "\\{2,1\\}"), ("5.4 \\text{ cents}", "5.4"), ("2^{10}", "1024"),
]  # fmt: skip
DIFFERENT = [
    ("7", "8"), ("-7", "7"), ("0.333", "\\frac{1}{3}"), ("(1,2)", "(2,1)"), ("(0,1)", "[0,1]"), ("(0,1]", "[0,1)"),
    ("1,2", "1,2,3"), ("\\sqrt{2}", "2"), ("x^2+1", "(x+1)^2"), ("yes", "no"), ("", "3"), ("3", ""),
    ("\\frac{1}{0}", "0"),
    ("72. I hope it is correct", "72"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
    ("25", "0.25"), ("1e400", "5"), ("2x+1=y", "y=2x-1"), ("i", "1"), ("\\pi", "3"), ("((((", "4"),
    ("12345678", "12345"), ("__import__('os').system('true')", "0"), ("a" * 5000, "1"),
]  # fmt: skip


@pytest.mark.parametrize("answer, right", EQUAL)
def test_equal_answers(grader, answer, right):
    assert grader.equal(answer, right) and grader.equal(right, answer)


@pytest.mark.parametrize("answer, right", DIFFERENT)
def test_different_answers(grader, answer, right):
    assert not grader.equal(answer, right) and not grader.equal(right, answer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['answer']!r} for {case['gold']!r}")
def test_cases_in_either_order(grader, case):
    kind = TASKS[case["task"]].kind
    verdicts = grader.equal(case["answer"], case["gold"], kind), grader.equal(case["gold"], case["answer"], kind)
    assert verdicts == (case["right"], case["right"])


LONG = {
    "an opened final answer": "final answer is $" * 80_000,
    "a final answer that is almost closed": "final answer is $x" * 80_000 + "$. I hop",
    "boxes": r"\boxed{" * 200_000,
    "spaces after a box": r"\boxed" + " " * 1_500_000,
    "numbers": "-1.1,111" * 200_000,
    "digits": "1" * 1_500_000,
    "phrases": "the answer is" * 120_000,
    "escaped dollars": "answer is $" + "\\$" * 700_000,
    "full stops": "answer is " + "./" * 700_000,
    "spaces after a choice": "answer: option" + " " * 1_500_000,
    "letters": "(a" * 700_000,
    "tuple": "(1," * 500_000,
    "brackets": "(" * 1_500_000,
    "list": "1," * 700_000,
    "spaces after a number": "1" + " " * 1_500_000 + "x",
    "emphasis": "*a" * 700_000,
    "text": r"1\text{a}" * 150_000 + "1",
    "chain": "x=" * 700_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_texts_take_linear_time(grader, text):
    start = time.monotonic()
    for kind in ("math", "choice"):
        extract(text, kind)
        assert grader.equal(text, text, kind) and not grader.equal(text, "3", kind)
    assert time.monotonic() - start < 6  # before: 17 to 34 s for a tenth of this


def test_the_longest_answers_that_are_read_take_little_time(monkeypatch):
    monkeypatch.setattr(Grader, "_formulas_equal", lambda *pair: False)  # it has a time limit of its own
    start = time.monotonic()
    for text in LONG.values():
        answer = text[:1000]
        assert Grader().equal(answer, answer) and not Grader().equal(answer, "3") and not Grader().equal("3", answer)
    assert time.monotonic() - start < 5


def test_time_limit_is_for_a_whole_list():
    slow = "9^{9^{9^{9}}}+x"
    with Grader(seconds=1.0) as grader:
        assert not grader.equal("2", "\\sqrt{5}")  # starts the process
        start = time.monotonic()
        assert not grader.equal(",".join(f"{slow}+{n}" for n in range(20)), ",".join(f"{n}-{slow}" for n in range(20)))
        assert time.monotonic() - start < 10  # a second for each pair would take more than twenty


def test_math_verify_logs_nothing(tmp_path):
    program = (
        "from rho1_jax.evals.grading import Grader\n"
        "if __name__ == '__main__':\n"
        "    with Grader() as grader:\n"
        "        print(grader.equal('x > 3', '(3, \\\\infty)'), grader.equal('\\\\sqrt{4}', '2'))\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_no_answer_is_wrong_and_letters_ignore_case(grader):
    assert not grader.equal(None, "3")
    assert grader.equal("b", "B", "choice") and not grader.equal("A", "B", "choice")


def test_comparison_has_a_time_limit():
    with Grader(seconds=1.0) as grader:
        assert grader.equal("2\\sqrt{3}", "\\sqrt{12}")
        start = time.monotonic()
        assert not grader.equal("9^{9^{9^{9}}}+x", "\\sqrt{x}+x^{2}")
        assert not grader.equal("(x+y+z+1)^{2000}", "(x+y+z+2)^{2000}+x")
        assert time.monotonic() - start < 20
        assert grader.equal("2\\sqrt{3}", "\\sqrt{12}")


def test_comparison_ends_without_the_parent():
    with Grader(seconds=1.0) as grader:
        assert grader.equal("2\\sqrt{3}", "\\sqrt{12}")
        grader._connection.send(("9^{9^{9^{9}}}+x", "\\sqrt{x}+x^{2}"))
        grader._process.join(timeout=60)
        assert grader._process.exitcode == -signal.SIGXCPU


def test_comparison_has_a_memory_limit(grader):
    assert grader.equal("2\\sqrt{3}", "\\sqrt{12}")
    assert resource.prlimit(grader._process.pid, resource.RLIMIT_AS) == (4 << 30, 4 << 30)


def test_missing_math_verify_is_reported(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('math_verify')")
    monkeypatch.syspath_prepend(tmp_path)
    with Grader() as grader:
        assert grader.equal("1/2", "0.5")  # numbers need no library
        with pytest.raises(UserError, match="install the extra `eval`"):
            grader.equal("\\sqrt{4}", "\\sqrt{2^2}")


def test_normalize():
    assert normalize("  \\$1{,}000 ") and normalize("\\tfrac{1}{2}") == "\\frac{1}{2}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, task, published, least",
    [
        ("rho-math-1b-v0.1/gsm8k/test_cot_-1_seed0_t0.0_s0_e-1.jsonl", "gsm8k", 0.362, 0.99),
        ("rho-math-1b-v0.1/minerva_math/test_cot_-1_seed0_t0.0_s0_e-1.jsonl", "math_oai", 0.158, 0.99),
        ("rho-math-1b-interpreter-v0.1/gsm8k/test_tora_-1_seed0_t0.0_s0_e-1.jsonl", "gsm8k", 0.584, 0.99),
        ("rho-math-1b-interpreter-v0.1/minerva_math/test_tora_-1_seed0_t0.0_s0_e-1.jsonl", "math_oai", 0.402, 0.99),
    ],
)
def test_published_generations_get_the_published_grades(file, task, published, least, tmp_path):
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is absent: the published generations were not graded")
    arguments = [f"--input={PUBLISHED / file}", f"--task={task}", "--json", f"--output={tmp_path / 'graded.jsonl'}"]
    done = run_command("tools.grade", *arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["accuracy"] == pytest.approx(published, abs=0.003)
    assert summary["published_accuracy"] == pytest.approx(published, abs=0.0005)
    assert summary["same_verdict"] >= least
    items = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text().splitlines()]
    assert len(items) == summary["items"]
    assert sum(item["correct"] for item in items) / len(items) == summary["accuracy"]


def test_grade_a_file_of_your_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"generation": "The answer is 3.", "answer": "3"}\n{"generation": "?", "answer": "4"}\n')
    done = run_command("tools.grade", f"--input={path}", "--task=svamp")
    assert done.returncode == 0 and "2 items" in done.stdout and "50.00%" in done.stdout
    for text, message in (('{"answer": "3"}\n', ":1: none of the keys generation, code"), ("", ": no records")):
        path.write_text(text)
        bad = run_command("tools.grade", f"--input={path}", "--task=svamp")
        assert bad.returncode == 2 and f"{path}{message}" in bad.stderr
    missing = run_command("tools.grade", f"--input={pathlib.Path('nowhere.jsonl')}", "--task=svamp")
    assert missing.returncode == 2 and "nowhere.jsonl: no such file" in missing.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("5", ":2: input should be an object, not 5"),
        ("[]", ":2: input should be an object, not []"),
        ("{", ":2: not JSON"),
        ('{"generation": "2"}', ":2: none of the keys gt, answer"),
        ('{"generation": 2, "answer": "2"}', ":2: generation: input should be a valid string, not 2"),
        ('{"generation": "2", "answer": {}}', ":2: answer"),
        ('{"generation": "2", "answer": NaN}', ":2: answer"),
        ('{"generation": "2", "answer": "2", "correct": 5}', ":2: correct: input should be a valid boolean, not 5"),
        ('{"generation": "2", "answer": "2", "score": "yes"}', ":2: score"),
        ('{"code": [], "answer": "2"}', ":2: none of the keys generation, code"),
        ('{"code": [3], "answer": "2"}', ":2: code"),
        ('{"generation": "2", "answer": "2", "index": 0}', ":2: index 0 is already on line 1"),
    ],
)
def test_bad_record_is_named_in_one_line(text, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"generation": "3", "answer": 3, "index": 0, "score": [true], "other": {}}\n' + text + "\n")
    with pytest.raises(UserError) as error:
        grade(path, "gsm8k")
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_verdicts_of_an_evaluation_are_compared(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"generation": "The answer is 3.", "answer": 3, "index": 0, "correct": false}\n')
    assert [(item["correct"], item["published"]) for item in grade(path, "gsm8k")] == [(True, False)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("no json\n", ":1: not JSON"),
        ('{"generation": "2"}\n{"answer": "3"}\n', ":2: none of the keys generation, code"),
        ('{"generation": "2"}\n', ": no programs with their output"),
    ],
)
def test_replay_refuses_a_file_without_transcripts(text, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    done = run_command("tools.replay_programs", f"--input={path}")
    assert done.returncode == 2 and f"{path}{message}" in done.stderr
