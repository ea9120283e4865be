"""Which chat template of a folder is opened, and which files are refused."""

import pytest
from chat_forms import QWEN, THINKING, make_tokenizer, write_named_templates

from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.prepare import open_chat_template
from rho1_jax.runtime.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "It is 42."}


@pytest.mark.parametrize("form", ["settings", "files"])
def test_conversations_with_tools_take_the_template_called_tool_use(tmp_path, form):
    make_tokenizer(tmp_path / "model")
    write_named_templates(tmp_path / "model", form, QWEN, THINKING)
    tokenizer, template = Tokenizer(tmp_path / "model"), ChatTemplate.open(tmp_path / "model")
    messages, trained, tools = [USER, ASSISTANT], [False, True], [{"type": "function", "function": {"name": "f"}}]
    for given_tools, source in ((None, QWEN), (tools, THINKING)):
        expected = ChatTemplate(source)
        assert template.encode(messages, trained, given_tools, tokenizer) == expected.encode(
            messages, trained, given_tools, tokenizer
        )
        assert template.prompt_ids(messages, tokenizer, given_tools) == expected.prompt_ids(
            messages, tokenizer, given_tools
        )
    tokenizer.save(tmp_path / "copy")
    assert ChatTemplate.open(tmp_path / "copy") == template
    template.save(tmp_path / "copy")
    assert ChatTemplate.open(tmp_path / "copy") == template
    ChatTemplate(QWEN).save(tmp_path / "copy")
    assert ChatTemplate.open(tmp_path / "copy") == ChatTemplate(QWEN)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("chat_template.jinja", "{% for %}", "chat_template.jinja: not a Jinja template: .* in line 1"),
        (
            "chat_template.jinja",
            "{% for _ in [1] %}" * 25 + "{% endfor %}" * 25,
            "not a usable Jinja template: too many",
        ),
        ("chat_template.jinja", "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "not a usable Jinja template: maximum"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot read the chat template"),
        ("tokenizer_config.json", '{"chat_template": 3}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", '{"chat_template": "\\n{{"}', "tokenizer_config.json: chat_template: .* in line 2"),
    ],
)
def test_an_invalid_template_is_refused_by_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        ChatTemplate.open(tmp_path)


def test_a_folder_may_have_no_template(tmp_path):
    make_tokenizer(folder := tmp_path / "tokenizer")
    assert ChatTemplate.open(tmp_path) is None
    for path in (folder, folder / "tokenizer.json"):
        with pytest.raises(UserError, match="--chat_template=model: .* has no chat_template.jinja"):
            open_chat_template("model", path)
    with pytest.raises(UserError, match="none.jinja: cannot read the chat template"):
        open_chat_template(str(tmp_path / "none.jinja"), folder)
