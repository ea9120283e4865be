"""The evaluation command on a finished run."""

import contextlib
import json
import math
import pathlib
import shutil
import tempfile
import types

import pytest
from helpers import run_command
from hypothesis import example, given, strategies

from rho1_jax.evals.sandbox import Sandbox
from rho1_jax.evals.tool_use import program_at_end
from rho1_jax.evaluate import Settings, check_settings, evaluate_model
from rho1_jax.export_hf import export_hf
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.runtime.progress import Progress
from rho1_jax.training.description import META_FILE, read_description


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"question": "{n}+1=", "answer": "#### {n + 1}"}}\n' for n in range(5)))
    return path


def test_losses_are_those_of_the_run_and_items_are_written(data, reference, questions, tmp_path):
    overrides = {"questions": f"sums={questions}", "max_new_tokens": 8}
    metrics = evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    assert metrics["eval/held_out/loss"] == pytest.approx(read_metrics(reference)[-1]["eval/held_out/loss"], rel=1e-6)
    items = [json.loads(line) for line in (tmp_path / "out" / "sums.jsonl").open()]
    assert [item["prompt"] for item in items] == [f"{n}+1=\n" for n in range(5)]
    assert metrics["eval/sums/accuracy"] == sum(item["correct"] for item in items) / 5
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved.items() >= metrics.items() and saved["checkpoint"].endswith("checkpoints/12")


def test_a_hugging_face_folder_is_evaluated_without_an_import(data, reference, questions, tmp_path):
    export_hf(str(reference), tmp_path / "folder", dtype=None)
    overrides = {"questions": f"sums={questions}", "data": f"held_out={data}", "max_new_tokens": 4, "rows": 32}
    of_run = evaluate_model(reference, overrides)
    of_folder = evaluate_model(tmp_path / "folder", overrides, tmp_path / "out")
    assert of_folder == pytest.approx(of_run, rel=1e-5)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["checkpoint"] == str(tmp_path / "folder")
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate_model(tmp_path / "folder", {})


def test_nothing_to_evaluate_is_an_error(reference):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate_model(str(reference), {"data": ""}, None, temperature=0.0, seed=0)


def test_no_questions_are_an_error(reference, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="none.jsonl: no questions"):
        evaluate_model(str(reference), {"questions": f"sums={tmp_path / 'none.jsonl'}"}, None, temperature=0.0, seed=0)


def test_a_run_of_another_mesh_is_evaluated_on_the_devices_at_hand(reference, questions, tmp_path, capsys):
    """Its config says microbatches of two rows on 64 devices; it is evaluated on eight."""
    path = tmp_path / "run"
    shutil.copytree(reference, path)
    overrides = {"questions": f"sums={questions}", "max_new_tokens": 4, "generate_batch": 3}
    expected = evaluate_model(str(path), overrides, None, temperature=0.0, seed=0)
    written = path / "checkpoints" / "12"
    described = read_description(written)
    described.meta.config.update(mesh={"data": 1, "fsdp": 32, "tensor": 2}, microbatches=4)
    (written / META_FILE).write_text(json.dumps(described.as_json()))
    capsys.readouterr()
    found = evaluate_model(str(path), overrides, None, temperature=0.0, seed=0)
    assert found == pytest.approx(expected, rel=1e-5)
    assert "fsdp=32" in (output := capsys.readouterr().out) and "sharding the model over all of them instead" in output


def test_the_command(reference, questions, tmp_path):
    arguments = [f"--checkpoint={reference}", f"--questions=sums={questions}", "--max_new_tokens=4"]
    arguments += ["--stops=", "--stops=\\nQ:", f"--output={tmp_path / 'out'}"]
    result = run_command("rho1_jax.evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["eval/held_out/loss", "eval/sums/accuracy"]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["eval"]["stops"] == ["\nQ:"]
    missing = run_command("rho1_jax.evaluate", "--checkpoint=nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith("error: --checkpoint=nowhere is neither a run")


@pytest.fixture
def data_dir(tmp_path):
    """Two tasks of seven items."""
    for name, record in (
        ("svamp", lambda n: {"Body": f"{n} apples.", "Question": "How many?", "Answer": float(n)}),
        ("mathqa", lambda n: {"problem": f"{n}?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "a"}),
    ):
        path = tmp_path / "tasks" / name / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(record(n)) + "\n" for n in range(7)))
    return tmp_path / "tasks"


def answering(monkeypatch, answer):
    """Replaces the model with `answer`: prompt and stop strings -> continuation. Generations end in no fixed order."""

    class FakeGenerator:
        def __init__(self, graphdef, params, tokenizer, rows):
            self.rows = rows

        def run(self, requests, *, stops, **options):
            while requests:
                taken = [requests.popleft() for _ in range(min(self.rows, len(requests)))]
                for number, prompt in reversed(taken):
                    yield number, answer(prompt, stops)

    monkeypatch.setattr("rho1_jax.evals.evaluator.Generator", FakeGenerator)


def knowing(prompt, stops):
    """Counts the apples in the prompt; answers B to anything else."""
    last = prompt.rsplit("Question: ", 1)[1]
    return f" The answer is {last.split()[0]}." if "apples" in last else " The answer is (B)."


TASKS = {"data": "", "tasks": "svamp,mathqa", "generate_batch": 2}


def test_tasks_are_asked_few_shot_and_graded(reference, data_dir, tmp_path, monkeypatch):
    answering(monkeypatch, knowing)
    metrics = evaluate_model(
        str(reference), TASKS | {"data_dir": str(data_dir)}, tmp_path / "out", temperature=0.0, seed=0
    )
    assert metrics == {"eval/svamp/accuracy": 1.0, "eval/mathqa/accuracy": 0.0, "eval/average/accuracy": 0.5}
    items = [json.loads(line) for line in (tmp_path / "out" / "svamp.jsonl").open()]
    assert items[3]["prompt"].count("Question: ") == 9 and items[3]["prompt"].endswith("3 apples. How many?\nAnswer:")
    assert (items[3]["extracted"], items[3]["answer"], items[3]["correct"]) == ("3", "3", True)
    few = evaluate_model(
        str(reference), TASKS | {"data_dir": str(data_dir), "task_items": 3}, tmp_path / "few", temperature=0.0, seed=0
    )
    assert few["eval/svamp/accuracy"] == 1.0 and len((tmp_path / "few" / "svamp.jsonl").read_text().splitlines()) == 3


def test_an_interrupted_evaluation_resumes(reference, data_dir, tmp_path, monkeypatch):
    overrides = TASKS | {"data_dir": str(data_dir)}
    path, asked, written = tmp_path / "out" / "svamp.jsonl", [], []

    def interrupted(prompt, stops):
        asked.append(prompt)
        if len(asked) > 5:
            written.append(path.read_text().count("\n"))
            raise KeyboardInterrupt
        return knowing(prompt, stops) + "\u2028"  # a line end for some, but not in JSON lines

    answering(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    whole = path.read_text()
    assert [json.loads(line)["index"] for line in whole.split("\n")[:-1]] == [1, 0, 3, 2, 5] and written == [5]
    path.write_text(whole[:-30])  # a line that was cut short
    del asked[3:]
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    asked.clear()
    answering(monkeypatch, lambda prompt, stops: asked.append(prompt) or knowing(prompt, stops))
    metrics = evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    assert metrics["eval/svamp/accuracy"] == 1.0 and len(asked) == 1 + 7
    assert [json.loads(line)["index"] for line in path.read_text().split("\n")[:-1]] == list(range(7))
    assert evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0) == metrics
    assert len(asked) == 1 + 7
    with pytest.raises(UserError, match=r"holds another evaluation \(settings.seed changed from 0 to 1\)"):
        evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": "gsm9k"}, "config.eval.tasks: 'gsm9k' is not one of gsm8k"),
        ({"tasks": "gsm8k"}, "gsm8k/test.jsonl: no such file"),
        ({"exemplars": "svamp=nowhere"}, "--exemplars=svamp=nowhere"),
        ({"exemplars": "svmap=nowhere"}, "config.eval.exemplars: 'svmap' is not a task; use gsm8k"),
        ({"tasks": "svamp,svamp"}, "config.eval.tasks: two sets of questions are named 'svamp'"),
    ],
)
def test_a_bad_task_is_refused(reference, data_dir, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate_model(str(reference), TASKS | {"data_dir": str(data_dir)} | changes, tmp_path / "out", 0.0, 0)
    assert not (tmp_path / "out").exists()


SETTINGS = {"checkpoint": "c", "eval": {}, "temperature": 0.0, "seed": 0}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "settings.json: input should be an object"),
        ("3", "settings.json: input should be an object"),
        ("{", "settings.json: not JSON"),
        ("", "settings.json: not JSON"),
        ("{}", "settings.json: checkpoint: field required"),
        (json.dumps(SETTINGS | {"eval": 3}), "settings.json: eval: input should be .*, not 3"),
        (json.dumps(SETTINGS | {"seed": "0"}), "settings.json: seed: input should be .*, not '0'"),
        (json.dumps(SETTINGS | {"temperature": math.nan}), "settings.json: temperature: "),
        (json.dumps(SETTINGS | {"eval": {"other": 1}}), "does not know config.eval.other"),
        (json.dumps(SETTINGS), "holds another evaluation .settings.checkpoint changed"),
    ],
)
def test_bad_settings_of_an_output_folder_are_refused(tmp_path, content, message):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        check_settings(tmp_path, Settings(**SETTINGS | {"checkpoint": "d"}))
    assert "\n" not in str(raised.value)


@given(strategies.text() | strategies.binary().map(lambda data: data.decode("latin-1")))
@example('{"checkpoint": "c", "eval": {"rows": []}, "temperature": 0, "seed": 0}')
def test_any_settings_are_read_or_refused_in_one_line(text):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "settings.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(UserError) as raised:
            check_settings(path, Settings(**SETTINGS))
        assert "\n" not in str(raised.value)


def test_an_empty_stop_string_is_refused_and_stops_need_questions(reference, questions, data_dir):
    with pytest.raises(UserError, match="config.eval.stops: an empty string would end every generation at once"):
        evaluate_model(str(reference), {"questions": f"sums={questions}", "stops": ["x", ""]})
    with pytest.raises(UserError, match="--stops applies only to --questions"):
        evaluate_model(str(reference), TASKS | {"data_dir": str(data_dir), "stops": ["x"]})


def test_progress_shows_tokens_before_the_first_answer(reference, questions, monkeypatch):
    notes = []

    class Shown(Progress):
        def advance(self, count, note=""):
            notes.append((count, note))
            super().advance(count, note)

    monkeypatch.setattr("rho1_jax.evals.evaluator.Progress", Shown)
    evaluate_model(str(reference), {"data": "", "questions": f"sums={questions}", "max_new_tokens": 40, "stops": []})
    first = next(n for n, (count, _) in enumerate(notes) if count)
    assert [note for _, note in notes[:first]] == ["80 tokens", "160 tokens", "240 tokens"]


def test_programs_are_run_and_their_output_is_read(reference, data_dir, tmp_path, monkeypatch):
    """The model writes a program, reads the output, and answers with it. Programs of one answer share their names."""
    seen = []

    def answer(prompt, stops):
        seen.append(prompt)
        assert "```output" in stops and prompt.startswith("<|user|>\n")
        outputs = prompt.split("```output\n")[1:]
        if not outputs:
            return f"```python\nx = {prompt.split()[1]} * 2\nprint(x)\n```\n"
        if len(outputs) == 1:
            return "Half of it:\n```python\nprint(x // 2)\n```\n"
        return f"So it is $\\boxed{{{outputs[-1].splitlines()[0]}}}$."

    answering(monkeypatch, answer)
    overrides = TASKS | {"tasks": "svamp", "data_dir": str(data_dir), "tool_use": True}
    metrics = evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    assert metrics["eval/svamp/accuracy"] == 1.0
    item = json.loads((tmp_path / "out" / "svamp.jsonl").read_text().splitlines()[3])
    assert item["prompt"] == "<|user|>\n3 apples. How many?\n<|assistant|>\n"
    assert item["generation"] == (
        "```python\nx = 3 * 2\nprint(x)\n```\n```output\n6\n```\n"
        "Half of it:\n```python\nprint(x // 2)\n```\n```output\n3\n```\nSo it is $\\boxed{3}$."
    )
    assert len(seen) == 3 * 7


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, UserError])
def test_no_sandbox_outlives_its_answer(reference, data_dir, tmp_path, monkeypatch, error):
    """Whether all goes well, the user interrupts it, or a process cannot be confined."""
    boxes = []

    class Watched(Sandbox):
        def __init__(self):
            super().__init__()
            boxes.append(self)

        def run(self, code):
            if error is UserError and self is boxes[4]:
                raise error("not on this machine")
            return super().run(code)

    def answer(prompt, stops):
        if "```output" not in prompt:
            return "```python\n1\n```\n"
        assert any(box._process for box in boxes)
        if error is KeyboardInterrupt:
            raise error
        return "The answer is 1."

    answering(monkeypatch, answer)
    monkeypatch.setattr("rho1_jax.evals.tool_use.Sandbox", Watched)
    overrides = TASKS | {"tasks": "svamp", "data_dir": str(data_dir), "tool_use": True}
    with pytest.raises(error) if error else contextlib.nullcontext():
        evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    assert len(boxes) == 7 and not any(box._process for box in boxes)


def test_programs_are_not_run_by_several_processes(reference, data_dir, monkeypatch):
    monkeypatch.setattr("rho1_jax.evals.evaluator.jax", types.SimpleNamespace(process_count=lambda: 2))
    overrides = TASKS | {"data_dir": str(data_dir), "tool_use": True}
    with pytest.raises(UserError, match="config.eval.tool_use runs programs on one host only"):
        evaluate_model(str(reference), overrides, None, temperature=0.0, seed=0)


def test_the_last_program_is_run_if_nothing_follows():
    assert program_at_end("```python\na\n```\nor\n```python\nb\n```\n") == "b\n"
    assert program_at_end("```python\na\n```\nIt is 3.") is None and program_at_end("```output\n3\n```") is None


def test_a_model_that_only_writes_programs_comes_to_an_end(reference, data_dir, tmp_path, monkeypatch):
    answering(monkeypatch, lambda prompt, stops: "```python\n1\n```\n")
    overrides = TASKS | {"tasks": "svamp", "data_dir": str(data_dir), "tool_use": True, "task_items": 2}
    evaluate_model(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    item = json.loads((tmp_path / "out" / "svamp.jsonl").read_text().splitlines()[0])
    assert item["generation"].count("```output\n1\n```") == 4 and item["generation"].count("```python") == 5
