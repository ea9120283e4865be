"""The command rho1: help, names, paths it refuses, generate and report, and the public functions."""

import importlib
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from forks import run_all
from helpers import config_of, edit_manifest, environment

import rho1_jax
from rho1_jax import cli, generate, report
from rho1_jax.configs import default
from rho1_jax.data.store import Store
from rho1_jax.evaluate import evaluate_model
from rho1_jax.export_hf import export_hf
from rho1_jax.models.generation import Continuation
from rho1_jax.runtime.errors import UserError

REMOTE = "gs://bucket/x"
REFUSED = "rho1 reads and writes local files only; mount the bucket, for example with gcsfuse"


def rho1(*arguments, code="from rho1_jax.cli import main; main()", cwd=None):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=100)


def test_help_lists_every_command_at_once_and_without_jax():
    start = time.monotonic()
    done = rho1("--help", code="import sys; from rho1_jax.cli import main; main(); print('jax' in sys.modules)")
    assert time.monotonic() - start < 2
    assert done.returncode == 0 and not done.stderr and done.stdout.endswith("False\n")
    for name, (_, line) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{line}$", done.stdout, re.MULTILINE)
    assert rho1().stdout == rho1("help").stdout == done.stdout.removesuffix("False\n")
    assert rho1("--version").stdout == f"{rho1_jax.__version__}\n"


@pytest.mark.parametrize("name, nearest", [("trian", "train"), ("tokenize", "tokenizer"), ("nonsense", "")])
def test_an_unknown_command_is_one_line_with_the_nearest(name, nearest):
    done = rho1(name)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: rho1 {name}: no such command. The nearest is `rho1 {nearest}")


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    """What `rho1 COMMAND --help` printed."""
    return run_all({name: [name, "--help"] for name in cli.COMMANDS}, tmp_path_factory.mktemp("help"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_shows_its_own_flags(name, helped):
    module = importlib.import_module(f"rho1_jax.{cli.COMMANDS[name][0]}")
    done = helped[name]
    assert done.status == 0 and not done.stderr
    assert done.stdout.startswith(module.__doc__)
    flags = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', inspect.getsource(module.main))
    shown = re.findall(r"^  --(?:\[no\])?(\w+)$", done.stdout, re.MULTILINE)
    assert flags and set(flags) <= set(shown)
    assert "logtostderr" not in shown and len(shown) == len(set(shown))
    assert ("config" in shown) == (name in ("train", "score"))


COMMAND_LINES = {
    "name": (["--config=tinyllama_math:sml"], "unknown stage 'sml'"),
    "nearest name": (["--config=tinylama_math:slm"], "--config=tinylama_math:slm: no config .* tinyllama_math, "),
    "no recipe": (["--config=recipe"], "--config=recipe: no config of that name"),
    "path": (["--config=folder/default.py"], "No such file or directory: 'folder/default.py'"),
    "path of a file here": (["--config=default.py"], "No such file or directory: 'default.py'"),
    "key": (["--config=default", "--config.optimizer.lr=1"], "Did you mean config.optimizer.learning_rate?"),
    "key elsewhere": (["--config=default", "--config.learning_rate=1"], "mean config.optimizer.learning_rate?"),
    "key of two": (["--config=default", "--config.chekpoint.every", "1"], "Did you mean config.checkpoint.every?"),
    "bool": (["--config=default", "--noconfig.eval.tools"], "--config.eval.tools: no such key"),
    "section": (["--config=default", "--config.optimzer.b1=1"], "Did you mean config.optimizer.b1?"),
    "value": (["--config=default", "--config.steps=0"], "config.steps=0"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    commands = {name: ["train", "--workdir=run", *arguments] for name, (arguments, _) in COMMAND_LINES.items()}
    return run_all(commands, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_configs_and_keys_by_name(name, refused):
    done = refused[name]
    (line,) = done.stderr.splitlines()
    assert done.status == 2 and re.search(COMMAND_LINES[name][1].replace("?", r"\?"), line), line
    assert not done.created


def remote_paths() -> dict[str, list[str]]:
    """A command line for each flag and config key that takes a path, with REMOTE there."""
    commands = {
        "train": (["--config=default:clm", "--workdir=run", "--config.data.train={data}"], ["config", "workdir"]),
        "score": (["--config=default:slm", "--config.data.train={data}", "--config.reference.scores=x"], ["config"]),
        "evaluate": (
            ["--checkpoint={reference}", "--tasks=svamp", "--lm_eval=x"],
            ["checkpoint", "output", "data", "questions", "exemplars", "data_dir", "lm_eval_path"],
        ),
        "generate": (["--checkpoint={reference}", "--prompt=1+1="], ["checkpoint", "prompts", "output"]),
        "tokenizer": (["--input={corpus}", "--output=x.model"], ["input", "output"]),
        "prepare": (["--input={corpus}", "--tokenizer={tokenizer}", "--output=x"], ["input", "tokenizer", "output"]),
        "import": (["--hf=x"], ["hf", "output", "verify"]),
        "export": (["--checkpoint={reference}", "--output=x"], ["checkpoint", "output"]),
        "grade": (["--input={corpus}", "--task=svamp"], ["input", "output"]),
        "dynamics": (["--run={reference}", "--data={data}"], ["run", "data", "reference", "output"]),
        "report": (
            ["--policy={reference}", "--reference={reference}", "--data={data}", "--output=x.html"],
            ["policy", "reference", "data", "output"],
        ),
    }
    named = {"data", "questions", "exemplars"}
    lines = {}
    for command, (base, flags) in commands.items():
        for flag in flags:
            value = f"x={REMOTE}" if command == "evaluate" and flag in named else REMOTE
            rest = ["--output=x"] if (command, flag) == ("import", "hf") else []
            lines[f"{command} {flag}"] = [command, *base, *rest, f"--{flag}={value}"]
    keys = {
        "data.train": [],
        "data.external": ["--config.selection.score=external"],
        "init.checkpoint": [],
        "reference.checkpoint": ["--config.selection.score=excess"],
        "eval.data": [],
        "eval.questions": [],
        "eval.exemplars": ["--config.eval.tasks=svamp"],
        "eval.data_dir": ["--config.eval.tasks=svamp"],
    }
    for key, rest in keys.items():
        value = f"x={REMOTE}" if key.removeprefix("eval.") in named else REMOTE
        lines[f"train config.{key}"] = ["train", *commands["train"][0], *rest, f"--config.{key}={value}"]
    for key in ("data.train", "reference.checkpoint"):
        lines[f"score config.{key}"] = ["score", *commands["score"][0], f"--config.{key}={REMOTE}"]
    mixture = f"--config.data.train={{data}}:3,{REMOTE}:1"
    return lines | {"train config.data.train (mixture)": ["train", *commands["train"][0], mixture]}


REMOTE_PATHS = remote_paths()


@pytest.fixture(scope="module")
def remote(data, reference, corpus, tokenizer, tmp_path_factory):
    known = {"data": data, "reference": reference, "corpus": corpus, "tokenizer": tokenizer.path}
    commands = {name: [part.format(**known) for part in line] for name, line in REMOTE_PATHS.items()}
    return run_all(commands, tmp_path_factory.mktemp("remote"))


@pytest.mark.parametrize("name", REMOTE_PATHS)
def test_a_path_with_a_scheme_is_refused_and_nothing_is_created(name, remote):
    done = remote[name]
    (line,) = done.stderr.splitlines()
    assert done.status == 2 and line.startswith("error: ") and REFUSED in line
    assert REMOTE in line and name.split()[1].rpartition(".")[2] in line
    assert not done.created


def test_generate_returns_texts_in_the_order_of_the_prompts(reference, monkeypatch):
    """The generator yields them as they end."""

    def finished(self, requests, **options):
        assert list(requests) == [(0, "a"), (1, "b"), (2, "c")] and options["max_new_tokens"] == 5
        yield from [Continuation(number, text, [7], [-0.5]) for number, text in ((2, "C"), (0, "A"), (1, "B"))]

    monkeypatch.setattr(generate.Generator, "run", finished)
    continuations = generate.generate_text(reference, ["a", "b", "c"], max_new_tokens=5)
    assert [continuation.text for continuation in continuations] == ["A", "B", "C"]
    assert continuations[1] == Continuation(1, "B", [7], [-0.5])


PLUGIN = """
from __future__ import annotations

import dataclasses

from rho1_jax.evals.tasks import TASKS, Item, Task
from rho1_jax.method.objectives import register_objective
from rho1_jax.models.families import Family, register_family
from rho1_jax.models.families.llama import TENSORS

@dataclasses.dataclass
class Record:
    answer: str

TASKS["plugged"] = Task(file="x.jsonl", kind="math", item=lambda record: Item("", Record("1").answer), shots=0)

register_family(Family("plugged", "PluggedForCausalLM", "plugged", TENSORS))

@register_objective
def halved(policy_loss_BL, weight_BL):
    return weight_BL * policy_loss_BL / 2
"""


@pytest.mark.slow
def test_a_plugin_registers_before_any_command_runs(data, tmp_path):
    """A family, where only its checkpoint names it; loaded twice, and missing or broken."""
    (tmp_path / "plugged.py").write_text(PLUGIN)
    (tmp_path / "broken.py").write_text("import no_such_module")
    (tmp_path / "graded.jsonl").write_text('{"generation": "The answer is 2.", "answer": "2"}\n')
    plugin, run = f"--plugin={tmp_path}/plugged.py", f"{tmp_path}/run"
    settings = {"steps": 1, "batch_size": 8, "objective": "halved", "model.family": "plugged", "data.train": data}
    settings |= {"model.width": 32, "model.layers": 1, "model.heads": 2, "model.kv_heads": 2, "model.head_width": 8}
    keys = [f"--config.{key}={value}" for key, value in settings.items()]
    train = ["train", "--config=default:clm", f"--workdir={run}", *keys]
    trained = run_all({"trained": [*train, plugin, plugin], "unknown": train}, tmp_path / "first", make=True)
    assert trained["trained"].status == 0, trained["trained"].stderr
    assert trained["unknown"].status == 2 and "is not one of cross_entropy" in trained["unknown"].stderr
    export = ["export", f"--checkpoint={run}", "--output=folder"]
    done = run_all(
        {
            "export": [*export, plugin],
            "without": export,
            "missing": [*export, "--plugin=nowhere.py"],
            "broken": [*export, f"--plugin={tmp_path}/broken.py"],
            "no_python": [*export, f"--plugin={tmp_path}/graded.jsonl"],
            "grade": ["grade", f"--input={tmp_path}/graded.jsonl", "--task=plugged", plugin],
            "no_task": ["grade", f"--input={tmp_path}/graded.jsonl", "--task=plugged"],
        },
        tmp_path / "second",
        make=True,
    )
    assert done["export"].status == 0 and done["export"].created == ["folder"], done["export"].stderr
    assert done["grade"].status == 0 and "100.00" in done["grade"].stdout, done["grade"].stdout + done["grade"].stderr
    for name, message in (
        ("no_python", "--plugin=.*graded.jsonl: not a Python file; its name must end in .py"),
        ("no_task", "--task='plugged' is not one of gsm8k"),
        ("without", "config.model.family='plugged' is not one of llama.*load your own with --plugin=FILE.py"),
        ("missing", "--plugin=nowhere.py: FileNotFoundError"),
        ("broken", "--plugin=.*broken.py: ModuleNotFoundError: No module named 'no_such_module'"),
    ):
        (line,) = done[name].stderr.splitlines()
        assert done[name].status == 2 and re.search(message, line) and not done[name].created, line


def generated(*arguments, **options):
    return [continuation.text for continuation in generate.generate_text(*arguments, **options)]


def test_generate_continues_until_a_stop_or_the_limit(reference):
    prompts = ["Document 1: 2+2=", "and so on", "Document 2: 1+1="]
    texts = generated(reference, prompts, max_new_tokens=8)
    assert [generated(reference, [prompt], max_new_tokens=8) for prompt in prompts] == [[t] for t in texts]
    assert any(texts) and len(texts) == 3
    options = {"max_new_tokens": 8, "temperature": 2.0}
    drawn = [generated(reference, prompts, seed=seed, **options) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = max(texts, key=len)
    stopped = generated(reference, [prompts[texts.index(whole)]], max_new_tokens=8, stops=[whole[1:3]])
    assert stopped == [whole[: whole.index(whole[1:3])]]


def test_generate_reads_and_writes_files(reference, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Document 1:"}\n{"prompt": "two\\nlines"}\n')
    (tmp_path / "prompts.txt").write_text("Document 1:\n\nand\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    for name, prompts in (("prompts.jsonl", ["Document 1:", "two\nlines"]), ("prompts.txt", ["Document 1:", "and"])):
        assert generate.read_items(tmp_path / name, chat=False) == [{"prompt": prompt} for prompt in prompts]
    with pytest.raises(UserError, match=r"bad.jsonl:2: missing keys: needs 'prompt'"):
        generate.read_items(tmp_path / "bad.jsonl", chat=False)
    base = ["generate", f"--checkpoint={reference}", "--max_new_tokens=8"]
    commands = {
        "file": [*base, f"--prompts={tmp_path}/prompts.jsonl", "--output=new/out.jsonl"],
        "printed": [*base, "--prompt=Document 1:", "--prompt=two\nlines"],
        "none": base,
    }
    done = run_all(commands, tmp_path)
    assert done["file"].status == done["printed"].status == 0, done["file"].stderr + done["printed"].stderr
    lines = (tmp_path / "file" / "cwd" / "new" / "out.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert all(len(item["token_ids"]) == len(item["logprobs"]) > 0 for item in items)
    assert all(max(item["logprobs"]) <= 0 for item in items)
    assert [item["prompt"] for item in items] == ["Document 1:", "two\nlines"]
    assert done["printed"].stdout == "\n\n".join(item["prompt"] + item["continuation"] for item in items) + "\n"
    assert done["none"].status == 2 and "give --prompt=TEXT, --prompts=FILE or --chat" in done["none"].stderr


def test_report_shows_the_selected_tokens_of_any_two_checkpoints(data, reference, tmp_path):
    store = Store(data)
    scores, ratio = report.compare(reference, reference, store, rows=3, ratio=None)
    assert ratio == 0.6 and len(scores.batch.tokens) == 8  # sharded over eight devices
    assert scores.eligible_BL.any(axis=1).tolist() == [True] * 3 + [False] * 5
    assert (scores.policy_loss_BL == scores.reference_loss_BL).all()
    eligible = int(scores.eligible_BL.sum())
    assert int(report.compare(reference, reference, store, 3, 0.25)[0].selected_BL.sum()) == -(-eligible // 4)
    flags = [f"--policy={reference}", f"--reference={reference}", f"--data={data}", "--rows=3"]
    done = run_all({"report": ["report", *flags, "--output=new/page.html"]}, tmp_path)["report"]
    assert done.status == 0, done.stderr
    page = (tmp_path / "report" / "cwd" / "new" / "page.html").read_text()
    assert page.count('class="row"') == 3 and 'class="selected"' in page and "SLM selects 60%" in page
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script|@import', page)


def test_report_takes_hugging_face_folders(data, reference, tmp_path):
    export_hf(str(reference), tmp_path / "folder", dtype=None)
    of_folders, ratio = report.compare(tmp_path / "folder", tmp_path / "folder", Store(data), rows=3, ratio=None)
    of_runs, _ = report.compare(reference, reference, Store(data), rows=3, ratio=None)
    assert ratio == 0.6
    np.testing.assert_allclose(of_folders.policy_loss_BL, of_runs.policy_loss_BL, rtol=1e-5)
    np.testing.assert_array_equal(of_folders.reference_loss_BL, of_folders.policy_loss_BL)


def test_report_refuses_data_of_another_tokenizer(data, reference, tmp_path):
    shutil.copytree(data, tmp_path / "rows")
    edit_manifest(tmp_path / "rows", tokenizer_fingerprint="0" * 64)
    with pytest.raises(UserError, match="--policy=.* has another tokenizer"):
        report.compare(reference, reference, Store(tmp_path / "rows"), rows=3, ratio=None)


def test_importing_the_package_does_not_import_jax():
    done = rho1(code="import sys, rho1_jax; print('jax' in sys.modules, dir(rho1_jax))")
    assert done.returncode == 0 and done.stdout.startswith("False") and "'train_model'" in done.stdout


@pytest.mark.parametrize("name", [name for name in rho1_jax.__all__ if name != "__version__"])
def test_the_public_functions_have_docstrings(name):
    function = getattr(rho1_jax, name)
    assert callable(function) and inspect.getdoc(function)
    module, own_name = rho1_jax._PUBLIC[name]
    assert getattr(importlib.import_module(module), own_name) == function
    assert not (pathlib.Path(rho1_jax.__file__).parent / f"{name}.py").exists()


def test_modules_are_not_hidden_by_public_names():
    assert set(rho1_jax.__all__) == {"__version__", *rho1_jax._PUBLIC}
    assert inspect.ismodule(importlib.import_module("rho1_jax.train")) and rho1_jax.evaluate_model is evaluate_model
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rho1_jax.nothing  # noqa: B018


def test_a_run_from_a_notebook(data, tmp_path):
    config = config_of("clm", data)
    config.steps = 1
    rho1_jax.train_model(config, tmp_path / "run")
    assert len(rho1_jax.generate_text(tmp_path / "run", ["1+1="], max_new_tokens=4)) == 1
    assert default.get_config().steps == 1000
