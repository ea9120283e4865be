"""Chat templates give the token ids of Transformers' `apply_chat_template`."""

import json
import pathlib

import pytest
import transformers
from chat_forms import TEMPLATES, make_tokenizer

from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.records import BadRecord
from rho1_jax.data.tokenizer import Tokenizer

pytestmark = pytest.mark.peers

USER = {"role": "user", "content": "What is 6 times 7?"}
ASSISTANT = {"role": "assistant", "content": " It is 42.\n"}
CALL = {"type": "function", "id": "1", "function": {"name": "times", "arguments": {"a": 6, "b": ["7", '"x"\\ é']}}}
TOOLS = [{"type": "function", "function": {"name": "times", "description": "a*b", "parameters": {"type": "object"}}}]
CONVERSATIONS = {
    "short": [USER],
    "long": [USER, ASSISTANT, {"role": "user", "content": "  Thanks! 日本語 😀\n\n\ttab "}, ASSISTANT],
    "system": [{"role": "system", "content": "Be brief.\n"}, USER, ASSISTANT],
    "thoughts": [USER, {"role": "assistant", "content": "<think>\nHm, 42?\n</think>\n\nIt is 42."}],
    "reasoning": [USER, ASSISTANT | {"thinking": "Hm."}, USER, ASSISTANT | {"reasoning_content": "Hm?", "name": None}],
    "calls": [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "<tool_call> or </tool_call>"},
    ],
}


@pytest.fixture(scope="module", params=["byte level", "prepend", "metaspace"])
def folder(request, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, request.param)
    return folder


def apply(peer, template, messages, tools=None, **options):
    return peer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=True, **options)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_token_ids_are_those_of_transformers(folder, name, conversation, tools):
    messages, template, tokenizer = CONVERSATIONS[conversation], TEMPLATES[name], Tokenizer(folder)
    if conversation == "calls" and name not in ("qwen", "llama", "text calls"):
        # Transformers leaves the calls out, or refuses the missing content.
        with pytest.raises(BadRecord, match="does not write the assistant's tool_calls|the chat template refuses it"):
            ChatTemplate(template).prompt_ids(messages, tokenizer)
        return
    if (name, conversation) == ("text calls", "calls"):
        return  # see below
    peer, untrained = transformers.AutoTokenizer.from_pretrained(folder), [False] * len(messages)
    try:
        expected = apply(peer, template, messages, tools, return_dict=False)
    except Exception as error:  # the template refuses it
        with pytest.raises(ValueError, match="the chat template refuses it"):
            ChatTemplate(template).encode(messages, untrained, tools, tokenizer)
        assert name in ("gemma", "mistral", "chatml", "generation", "phi") or conversation != "short", error
        return
    ids, flags = ChatTemplate(template).encode(messages, untrained, tools, tokenizer)
    assert ids == expected and len(flags) == len(ids)
    prompt = apply(peer, template, messages, add_generation_prompt=True, return_dict=False)
    assert ChatTemplate(template).prompt_ids(messages, tokenizer) == prompt


def test_arguments_may_be_objects_or_text(folder):
    """Transformers passes arguments on as they are; we convert them to the form that the template accepts."""
    text = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)
    with_text = CALL | {"function": CALL["function"] | {"arguments": text}}
    objects, texts = ([USER, {"role": "assistant", "content": "", "tool_calls": [call]}] for call in (CALL, with_text))
    without_content = [USER, {"role": "assistant", "tool_calls": [CALL]}]
    peer, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for name, expected in (("qwen", objects), ("text calls", texts)):
        ids = apply(peer, TEMPLATES[name], expected, return_dict=False)
        for messages in (objects, texts, without_content):
            assert ChatTemplate(TEMPLATES[name]).encode(messages, [False, True], None, tokenizer)[0] == ids


@pytest.mark.parametrize("conversation", ["long", "system", "thoughts"])
def test_responses_are_those_that_transformers_marks(folder, conversation):
    messages, tokenizer = CONVERSATIONS[conversation], Tokenizer(folder)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = apply(peer, TEMPLATES["generation"], messages, **options)["assistant_masks"]
    trained = [message["role"] == "assistant" for message in messages]
    _, flags = ChatTemplate(TEMPLATES["generation"]).encode(messages, trained, None, tokenizer)
    assert flags == [bool(flag) for flag in expected] and any(flags)


@pytest.mark.parametrize("form", ["string", "list", "jinja"])
def test_the_models_template_is_the_one_that_transformers_takes(folder, tmp_path, form):
    make_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if form != "jinja":
        named = [{"name": "other", "template": "x"}, {"name": "default", "template": TEMPLATES["qwen"]}]
        settings["chat_template"] = TEMPLATES["qwen"] if form == "string" else named
    else:
        settings["chat_template"] = "x"
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES["qwen"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    peer, messages = transformers.AutoTokenizer.from_pretrained(tmp_path), CONVERSATIONS["calls"]
    ours = ChatTemplate.open(tmp_path).prompt_ids(messages, Tokenizer(tmp_path))
    assert ours == apply(peer, None, messages, add_generation_prompt=True, return_dict=False)
