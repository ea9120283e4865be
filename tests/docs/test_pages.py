"""The documentation: its code blocks run as they stand, and its generated pages leave nothing out."""

import dataclasses
import importlib.util
import pathlib
import re
import types

import pytest
from helpers import TINY, root

import rho1_jax
from rho1_jax.configs import default
from rho1_jax.configs.default import EvalConfig
from rho1_jax.evals import answers
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import TASKS
from rho1_jax.method.token_scores import SCORES
from rho1_jax.runtime.metrics import read_metrics

GUIDES = root() / "docs" / "guides"
PYTHON_BLOCK = re.compile(r"```python\n# file: (\S+)\n(.*?)```", re.DOTALL)
JSON_BLOCK = re.compile(r'```json title="(\S+)"\n(.*?)```', re.DOTALL)


@pytest.fixture
def hooks() -> types.ModuleType:
    return load(root() / "docs" / "hooks.py")


@pytest.fixture(autouse=True)
def registries():
    """Takes out again what a page registers."""
    before = [(registry, set(registry)) for registry in (SCORES, TASKS)]
    yield
    for registry, names in before:
        for name in set(registry) - names:
            del registry[name]


def load(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: str) -> dict[str, str]:
    """The Python blocks of a guide by file name, without the line that names it."""
    return dict(PYTHON_BLOCK.findall((GUIDES / page).read_text()))


def load_block(page: str, name: str, folder: pathlib.Path) -> types.ModuleType:
    path = folder / name
    path.write_text(blocks(page)[name])
    return load(path)


def train_three_steps(config, data, reference, workdir) -> list[dict[str, float]]:
    config.update(steps=3, batch_size=8, log_every=1)
    config.model.update({name: getattr(TINY, name) for name in ("width", "layers", "heads", "kv_heads", "head_width")})
    config.model.ff_width = TINY.ff_width
    config.data.train = str(data)
    if not config.reference.moves:
        config.reference.checkpoint = str(reference)
    rho1_jax.train_model(config, workdir)
    return read_metrics(workdir)


def keys(config, prefix="config."):
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]


def test_the_config_page_has_every_key_and_its_meaning(hooks):
    page = hooks.config_page()
    for key in keys(default.get_config()):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
        assert row.count(" | ") == 3 and not row.endswith("|  |"), row
    assert "| `config.optimizer.b1` | `float >= 0, < 1` | `0.9` |" in page
    assert "| `config.model.sliding_window` | `int >= 1, < 2 ** 31 or None` | `None` |" in page


def test_the_commands_page_has_every_flag(hooks):
    page = hooks.commands_page()
    for path in (root() / "rho1_jax").glob("*.py"):
        for flag in re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', path.read_text()):
            assert f"| `--{flag}` |" in page
    for field in dataclasses.fields(EvalConfig):
        assert (f"| `--{field.name}` | the run's | " in page) == (field.name != "every")
    assert page.count("| `--input` | required | Files or glob patterns") == 2  # of prepare and tokenizer


def test_a_page_for_each_room_names_each_module(hooks):
    for room in hooks.ROOMS:
        modules = [path.stem for path in (root() / "rho1_jax" / room).glob("*.py") if path.stem != "__init__"]
        page = hooks.room_page(room)
        assert modules and all(f"::: rho1_jax.{room}.{module}\n" in page for module in modules)


@pytest.mark.slow
def test_the_score_of_the_guide_is_the_example_and_trains(data, reference, tmp_path):
    assert blocks("add_score.md")["my_score.py"] == (root() / "docs" / "examples" / "own_score.py").read_text()
    config = load_block("add_score.md", "my_score.py", tmp_path).get_config()
    assert config.selection.score == "retrospective"
    metrics = train_three_steps(config, data, reference, tmp_path / "run")
    assert len(metrics) == 3 and all("reference_loss" in line for line in metrics)


@pytest.mark.slow
def test_the_rule_of_the_guide_weights_tokens(data, reference, tmp_path):
    config = load_block("add_score.md", "my_rule.py", tmp_path).get_config()
    metrics = train_three_steps(config, data, reference, tmp_path / "run")
    assert all(0 < line["selected_fraction"] < 1 for line in metrics)


@pytest.mark.slow
def test_the_objective_of_the_guide_trains(data, reference, tmp_path):
    config = load_block("add_objective.md", "my_objective.py", tmp_path).get_config()
    assert config.objective == "focal"
    metrics = train_three_steps(config, data, reference, tmp_path / "run")
    # (1 - p)^2 is at most 1.
    assert all(0 < line["objective"] < line["selected_loss"] for line in metrics)


def test_the_task_of_the_guide_is_asked_and_graded(tmp_path):
    for name, content in JSON_BLOCK.findall((GUIDES / "add_task.md").read_text()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    config = load_block("add_task.md", "my_task.py", tmp_path).get_config()
    name, _, exemplars = config.eval.exemplars.partition("=")
    assert name == config.eval.tasks
    with Grader() as grader:
        data_dir = tmp_path / config.eval.data_dir
        questions = answers.task_questions(name, str(data_dir), 0, str(tmp_path / exemplars), False, grader)
        first = questions.items[0]
        assert len(questions.items) == 2 and first.answer == "180"
        assert first.prompt.startswith("Question: How many minutes are 2 hours?\nAnswer: An hour has 60 minutes.")
        assert first.prompt.endswith("\n\nQuestion: How many seconds are 3 minutes?\nAnswer:")
        answer = questions.extract("A minute has 60 seconds. The answer is 180.")
        assert questions.equal(answer, first.answer) and not questions.equal("60", first.answer)
