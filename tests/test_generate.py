"""The command `rho1 generate`: chat, streaming, files of conversations and command lines it refuses."""

import json
import sys

import jax
import pytest
from flax import nnx
from forks import run_all
from helpers import continuations, run_command, tiny, write_hf_folder

from rho1_jax import generate
from rho1_jax.models import decoder
from rho1_jax.models.generation import Continuation
from rho1_jax.runtime.errors import UserError
from rho1_jax.training.pretrained import Pretrained

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant: """


def rendered(*messages):
    """What TEMPLATE makes of (role, content) pairs."""
    return "".join(f"{role}: {content}\n" for role, content in messages) + "assistant: "


@pytest.fixture(scope="module")
def setup(tokenizer):
    """A model with large parameters, so that the next token is clear."""
    config = tiny(vocab_size=tokenizer.vocab_size, width=48, layers=1, context_length=512)
    return decoder.build(config), jax.tree.map(lambda x: 3 * x, decoder.init_params(config, 3))


@pytest.fixture(scope="module")
def folder(setup, tokenizer, tmp_path_factory):
    """That model as a Hugging Face folder, with a chat template."""
    graphdef, params = setup
    config = nnx.merge(graphdef, params).config
    folder = write_hf_folder(tmp_path_factory.mktemp("folder") / "model", config, params, tokenizer)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def one_device(monkeypatch):
    """Commands run on one device, as on a laptop: that compiles sooner."""
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.fixture
def continued(setup, tokenizer):
    """A function that continues a text by 6 tokens."""

    def continued(prompt, **options):
        (text,) = continuations(*setup, tokenizer, [prompt], max_new_tokens=6, stops=(), **options)
        return text

    return continued


def test_a_chat_on_standard_input_keeps_its_history(folder, continued, one_device):
    lines = "Document 1:\n\nand so on\n/clear\nDocument 1:\n/exit\nnever\n"
    done = run_command(
        "rho1_jax.cli", "generate", f"--checkpoint={folder}", "--chat", "--system=Be so.", "--max_new_tokens=6",
        stdin=lines,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    system, first = ("system", "Be so."), ("user", "Document 1:")
    answer = continued(rendered(system, first))
    second = continued(rendered(system, first, ("assistant", answer), ("user", "and so on")))
    assert done.stdout == f"{answer}\n{second}\n{answer}\n" and answer and second
    assert "Traceback" not in done.stderr and "> " not in done.stdout


def test_prompts_and_conversations_on_the_command_line(folder, continued, tmp_path, one_device):
    turns = [("user", "Document 1:"), ("assistant", "so"), ("user", "on")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + '\n{"prompt": "Document 1:"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"messages": [{"role": "user"}]}\n')
    (tmp_path / "none.jsonl").write_text('{"messages": []}\n')
    base = ["generate", f"--checkpoint={folder}", "--max_new_tokens=6"]
    commands = {
        "file": [*base, "--chat", "--system=S", f"--prompts={tmp_path}/chats.jsonl", "--output=out.jsonl"],
        "plain": [*base, "--prompt=Document 1:"],
        "sampled": [
            *base,
            "--prompt=Document 1:",
            "--temperature=2",
            "--top_p=0.5",
            "--seed=3",
            "--output=out.jsonl",
        ],
        "bad": [*base, "--chat", f"--prompts={tmp_path}/bad.jsonl"],
        "no messages": [*base, "--chat", f"--prompts={tmp_path}/none.jsonl"],
        "not a chat": [*base, f"--prompts={tmp_path}/chats.jsonl"],
        "greedy": [*base, "--prompt=x", "--top_p=0.5"],
        "top_p": [*base, "--prompt=x", "--temperature=1", "--top_p=1.5"],
        "system": [*base, "--prompt=x", "--system=x"],
        "output": [*base, "--chat", "--output=x.jsonl"],
        "dtype": [*base, "--prompt=x", "--dtype=int8"],
        "bytes": [*base, "--prompt=\udcff"],
        "stop": [*base, "--prompt=x", "--stop="],
        "seed": [*base, "--prompt=x", "--seed=99999999999999999999"],
    }
    done = run_all(commands, tmp_path / "done", make=True)
    first = continued(rendered(("system", "S"), *turns))
    second = continued(rendered(("system", "S"), turns[0]))
    items = [json.loads(line) for line in (tmp_path / "done" / "file" / "cwd" / "out.jsonl").read_text().splitlines()]
    assert done["file"].status == 0, done["file"].stderr
    assert [item["continuation"] for item in items] == [first, second] and first != second
    assert items[0]["messages"] == messages and items[1]["prompt"] == "Document 1:"
    assert done["plain"].stdout == "Document 1:" + continued("Document 1:") + "\n"
    drawn = continued("Document 1:", temperature=2.0, top_p=0.5, seed=3)
    (item,) = map(json.loads, (tmp_path / "done" / "sampled" / "cwd" / "out.jsonl").open())
    assert item["continuation"] == drawn != done["plain"].stdout.removeprefix("Document 1:").strip("\n")
    for name, message in (
        ("bad", "bad.jsonl:2: messages: 0.content: field required"),
        ("no messages", "none.jsonl:1: messages: list should have at least 1 item"),
        ("not a chat", "chats.jsonl:1: missing keys: needs 'prompt'"),
        ("greedy", "--top_p=0.5 needs --temperature above 0"),
        ("top_p", "flag --top_p=1.5"),
        ("system", "--system needs --chat"),
        ("output", "--output needs --prompt=TEXT or --prompts=FILE"),
        ("dtype", "flag --dtype=int8"),
        ("bytes", "--prompt: not UTF-8 text"),
        ("stop", "--stop is empty"),
        ("seed", "flag --seed=99999999999999999999"),
    ):
        (line,) = done[name].stderr.splitlines()
        assert done[name].status == 2 and line.startswith("error: ") and message in line, line
        assert not done[name].stdout and not done[name].created


def test_a_model_without_a_template_cannot_chat(reference):
    with pytest.raises(UserError, match=r"--chat: .*/tokenizer has no chat template; use a model that was trained to"):
        generate._chat_encoder(Pretrained.open(reference, "--checkpoint"), None)


def test_the_dtype_is_that_of_parameters_and_computation(folder):
    model = Pretrained.open(folder, "--checkpoint")
    for dtype in ("bfloat16", None):
        with generate._loaded(model, 1, dtype) as generator:
            assert generator._config.compute_dtype == (dtype or "float32")
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(generator._params)} == {dtype or "float32"}


def test_control_characters_are_escaped_in_a_terminal_only(capsys, monkeypatch):
    class Model:
        def run(self, requests, on_text):
            on_text(0, "\x1b]0;title\x07\x9b2J\r\u3000\n\t.")
            yield Continuation(0, "", [], [])

    generate._print_one(Model(), "\x1b[2J", [1])
    assert capsys.readouterr().out == "\x1b[2J\x1b]0;title\x07\x9b2J\r\u3000\n\t.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate._print_one(Model(), "\x1b[2J", [1])
    assert capsys.readouterr().out == "\\x1b[2J\\x1b]0;title\\x07\\x9b2J\\r\u3000\n\t.\n"


def test_text_is_printed_piece_by_piece(capsys):
    seen = []

    class Pieces:
        def run(self, requests, on_text, pieces):
            for piece in pieces:
                on_text(0, piece)
                seen.append(capsys.readouterr().out)
            yield Continuation(0, "".join(pieces), [], [])

    generate._print_one(Pieces(), "2+2=", [1], pieces=("4", ".\n"))
    assert seen == ["2+2=4", ".\n"] and capsys.readouterr().out == "\n"
    generate._print_one(Pieces(), "2+2=", [1], pieces=())
    assert capsys.readouterr().out == "2+2=\n"
