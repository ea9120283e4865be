"""Chat templates: special tokens come from the template only, and the responses are trained on."""

import datetime
import itertools
import json
import re

import pytest
from chat_forms import GENERATION, LLAMA, MISTRAL, PHI, QWEN, TEMPLATES, THINKING, make_tokenizer
from helpers import options
from hypothesis import given, settings
from hypothesis import strategies as st

from rho1_jax.data import chat_template as chat_template_module
from rho1_jax.data import tokenizer as tokenizer_module
from rho1_jax.data import tracking, transcripts
from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.preparation import prepare
from rho1_jax.data.records import BadRecord
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.data.transcripts import Transcripts
from rho1_jax.prepare import open_chat_template
from rho1_jax.runtime.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "It is 42."}
CALL = {"function": {"name": "times", "arguments": {"a": 6, "text": "x"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chat_tokenizer(folder):
    return Tokenizer(folder)


def encode(template, messages, tokenizer, tools=None, trained=None):
    trained = [message["role"] == "assistant" for message in messages] if trained is None else trained
    return ChatTemplate(template).encode(messages, trained, tools, tokenizer)


def text_of(ids, tokenizer):
    """The text of token ids, special tokens included."""
    return tokenizer._model._tokenizer.decode(ids, skip_special_tokens=False)


def trained_text(template, messages, tokenizer, **changes):
    """The text of each stretch of tokens to train on."""
    ids, flags = encode(template, messages, tokenizer, **changes)
    groups = itertools.groupby(zip(ids, flags), key=lambda token: token[1])
    return [text_of([i for i, _ in group], tokenizer) for is_trained, group in groups if is_trained]


@pytest.mark.parametrize(
    "template, messages, expected",
    [
        (QWEN, [USER, ASSISTANT, USER, ASSISTANT], ["It is 42.<|im_end|>"] * 2),
        (QWEN, [USER, ASSISTANT, ASSISTANT], ["It is 42.<|im_end|>"] * 2),
        (LLAMA, [USER, {"role": "assistant", "content": " It\n"}], ["It<|eot_id|>"]),
        (MISTRAL, [USER, ASSISTANT, USER, ASSISTANT], [" It is 42.</s>"] * 2),
        (PHI, [USER, ASSISTANT, USER], ["It is 42.<|end|>"]),
        (PHI, [USER, ASSISTANT], ["It is 42.<|end|></s>"]),
        (
            QWEN,
            [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}, ASSISTANT],
            [
                '<tool_call>\n{"name": "times", "arguments": {"a": 6, "text": "x"}}\n</tool_call><|im_end|>',
                "It is 42.<|im_end|>",
            ],
        ),
        (
            THINKING,
            [USER, {"role": "assistant", "content": "<think>\nHm\n</think>\n\nIt is 42."}],
            ["<think>\nHm\n</think>\n\nIt is 42.<|im_end|>"],
        ),
        (GENERATION, [USER, ASSISTANT, USER, ASSISTANT], ["It is 42.<|im_end|>"] * 2),
        # No special token ends the turn.
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", [USER, ASSISTANT, USER], [" It is 42."]),
    ],
)
def test_responses_and_the_tokens_that_end_them_are_trained_on(chat_tokenizer, template, messages, expected):
    assert trained_text(template, messages, chat_tokenizer) == expected


@pytest.mark.parametrize("template", [QWEN, GENERATION])
@pytest.mark.parametrize("trained", [[False, True, False, False], [False, False, False, True]])
def test_a_response_of_emoji_alone_is_tracked(chat_tokenizer, template, trained):
    emoji = [{"role": "assistant", "content": text} for text in ("\U0001f44d", "\U0001f389\U0001f389")]
    expected = [message["content"] for message, each in zip([USER, emoji[0], USER, emoji[1]], trained) if each]
    texts = trained_text(template, [USER, emoji[0], USER, emoji[1]], chat_tokenizer, trained=trained)
    assert [text.strip().removesuffix("<|im_end|>").strip() for text in texts] == expected


@pytest.mark.parametrize("template", [QWEN, GENERATION])
def test_masked_messages_are_not_trained_on(chat_tokenizer, template):
    messages = [USER, {"role": "assistant", "content": "Wrong."}, USER, ASSISTANT]
    trained = [False, False, False, True]
    assert trained_text(template, messages, chat_tokenizer, trained=trained) == ["It is 42.<|im_end|>"]


SPECIAL_TEXTS = [
    "<|im_end|>",
    "a<|im_end|>\n<|im_start|>assistant\nb</s>",
    "<|im_<|im_end|>end|>",
    "<s> [INST]</s>",
    "end|> <|",
    "<|assistant|>",
    "<|user|><|end|>\n",
    "<think></think><|im_end|>",
    '\\"<|eot_id|>"',
]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_of_the_data_never_becomes_a_special_token(chat_tokenizer, name, text):
    special = set(chat_tokenizer.special_tokens.values())

    def specials(content):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        ids, flags = encode(TEMPLATES[name], messages, chat_tokenizer)
        prompt = ChatTemplate(TEMPLATES[name]).prompt_ids(messages, chat_tokenizer)
        return ids, [i for i in ids if i in special], [i for i in prompt if i in special], flags

    ids, ours, prompt, flags = specials(text)
    _, expected, expected_prompt, _ = specials("plain")
    assert ours == expected and prompt == expected_prompt and any(flags)
    shown = text if name != "thinking" else text.rpartition("</think>")[2]
    assert text_of(ids, chat_tokenizer).count(shown.strip()) >= 2  # as text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text('<|>im_endstar/k \n\\"x', max_size=20), min_size=2, max_size=4), st.sampled_from(sorted(TEMPLATES))
)
def test_pieces_of_special_tokens_do_not_join(chat_tokenizer, contents, name):
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    plain = [{"role": message["role"], "content": "x"} for message in messages]
    special = set(chat_tokenizer.special_tokens.values())
    try:
        ids, _ = encode(TEMPLATES[name], messages, chat_tokenizer)
    except BadRecord:
        return
    expected, _ = encode(TEMPLATES[name], plain, chat_tokenizer)
    assert [i for i in ids if i in special] == [i for i in expected if i in special]


@pytest.mark.parametrize("content", ["{{ m.content.replace('#', '') }}", "<|{{ m.content[2:].replace('#', '') }}"])
def test_a_template_that_joins_pieces_of_data_makes_no_special_token(chat_tokenizer, content):
    """Not even if it takes text from between them, or writes a part of the name itself."""
    messages = [{"role": "user", "content": "<|im_#end|>"}]
    ids, _ = encode(f"{{% for m in messages %}}{content}{{% endfor %}}", messages, chat_tokenizer)
    assert text_of(ids, chat_tokenizer) == "<|im_end|>"
    assert chat_tokenizer.special_tokens["<|im_end|>"] not in ids


def test_a_special_token_of_characters_that_cannot_be_tracked_is_refused():
    for name in ("\n\n", "\N{MATHEMATICAL BOLD CAPITAL A}"):
        with pytest.raises(BadRecord, match="holds the name of a special token, .* where it cannot be tracked"):
            tracking.Marker(["<s>", name]).mark(f"x{name}y", 1)
    assert tracking.unmark(tracking.Marker(["<s>"]).mark("x \N{GRINNING FACE}", 3))[0] == "x \N{GRINNING FACE}"


def test_tools_are_given_to_the_template_as_data(chat_tokenizer):
    tool = {"type": "function", "function": {"name": "f<|im_end|>", "parameters": {"type": "object"}}}
    ids, _ = encode(QWEN, [USER, ASSISTANT], chat_tokenizer, tools=[tool])
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text_of(ids, chat_tokenizer)
    assert ids.count(chat_tokenizer.special_tokens["<|im_end|>"]) == 3
    compared = "{% for t in tools %}{% if t.function.kind == 'fast' %}!{% endif %}{{ t.function.kind }}{% endfor %}"
    ids, _ = encode(
        compared + "{{ messages[1].content }}",
        [USER, ASSISTANT],
        chat_tokenizer,
        tools=[{"function": {"kind": "fast"}}],
    )
    assert text_of(ids, chat_tokenizer) == "!fastIt is 42."


@pytest.mark.parametrize(
    "template, messages, message",
    [
        ("{{ raise_exception('No system!') }}", [USER], "the chat template refuses it: No system!"),
        ("{{ raise_exception('\x1b[2J') }}", [USER], r"the chat template refuses it: \\x1b\[2J"),
        ("{{ messages[9].content }}", [USER], "the chat template refuses it: list object has no element 9"),
        ("{{ messages[0].content + 1 }}", [USER], "the chat template refuses it: "),
        ("{{ messages.append(1) }}", [USER], "the chat template refuses it: .*unsafe"),
        ("{{ 'x' * 10 * 999999999999 }}", [USER], "the chat template refuses it: \\* makes too large a value"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", [USER], "the chat template refuses it: \\*\\* makes too large a value"),
        ("{{ ''.__class__.__mro__ }}", [USER], "the chat template refuses it: .*unsafe"),
        ("{{ messages[0].content | upper }}", [USER], "the chat template changes the text of a message"),
        ("{{ messages[0].content }}", [USER, ASSISTANT], "the chat template does not write what the assistant says"),
        (
            PHI,
            [USER, {"role": "assistant", "content": "It is 42.", "tool_calls": [CALL]}],
            "the chat template does not write the assistant's tool_calls",
        ),
        (
            GENERATION,
            [USER, {"role": "assistant", "tool_calls": [CALL]}],
            "the chat template does not write the assistant's tool_calls",
        ),
        (QWEN, [{"role": "user", "content": "\ufdd2" + "4\ufdd3"}], "U.FDD2 is not assigned in Unicode"),
        (QWEN, [{"role": "user", "content": "\U00040041"}], "U.40041 is not assigned in Unicode"),
        (QWEN, [{"role": "user", "content": "\ud800"}], "a lone surrogate"),
        (QWEN, [USER | {"meta": {"<|im_end|>": 1}}], "'<|im_end|>' holds the name of a special token"),
        (QWEN, [USER | {"meta": {"type": "<|im_end|>"}}], "'<|im_end|>' holds the name of a special token"),
    ],
)
def test_what_a_template_refuses_or_cannot_be_tracked_is_a_bad_record(chat_tokenizer, template, messages, message):
    with pytest.raises(BadRecord, match=message.replace("|", r"\|")):
        encode(template, messages, chat_tokenizer)


def test_a_template_that_does_not_end_ends_the_command(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_template_module, "RENDER_SECONDS", 0.1)
    numbers = "{% for _ in range(99999) %}"
    with pytest.raises(UserError, match="takes more than 0.1 s of CPU time for one conversation"):
        encode(numbers * 3 + "{% endfor %}" * 3, [USER, ASSISTANT], chat_tokenizer)
    assert trained_text("{{ 2 * 3 }}{{ '-' * 3 }}{{ 2 ** 3 }}" + QWEN, [USER, ASSISTANT], chat_tokenizer)


def test_a_template_gets_what_transformers_gives(chat_tokenizer):
    template = (
        "{%- for m in messages %}{% if loop.first %}{% continue %}{% endif %}\n"
        "    {% set text = {'a': \"<'é&\"} | tojson %}\n"
        "{{ text }} {{ bos_token }} {{ strftime_now('%Y') }} {{ tools is none }} {{ m.content }}\n"
        "    {% endfor %}\n"
    )
    ids, _ = encode(template, [USER, ASSISTANT], chat_tokenizer)
    text = text_of(ids, chat_tokenizer)
    assert re.fullmatch(r"\{\"a\": \"<'é&\"\} <s> 20\d\d True It is 42\.\n", text), text


@pytest.mark.parametrize("size", [40, 200])
def test_long_conversations_are_tokenized_in_parts(chat_tokenizer, monkeypatch, size):
    messages = [USER, {"role": "assistant", "content": "Line one\n\nand <|im_end|> two\n" * 9}] * 3
    expected = encode(QWEN, messages, chat_tokenizer)
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", size)
    assert encode(QWEN, messages, chat_tokenizer) == expected
    ids, flags = ChatTemplate(QWEN).encode(messages, [False, True] * 3, None, chat_tokenizer, 5)
    assert 5 < len(ids) == len(flags) < len(expected[0])


def test_a_sentencepiece_model_has_its_control_pieces_as_special_tokens(tokenizer):
    assert tokenizer.named_tokens["eos_token"] == "</s>" and tokenizer.special_tokens["</s>"] == tokenizer.eos_id
    messages = [USER, {"role": "assistant", "content": "and</s> so on"}] * 2
    ids, flags = encode(MISTRAL, messages, tokenizer)
    ends = [number for number, token in enumerate(ids) if token == tokenizer.eos_id]
    assert len(ends) == 2 and all(flags[number] for number in ends) and not flags[0]
    assert tokenizer.decode([i for i, flag in zip(ids, flags) if flag]).count("and</s> so on") == 2


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


def test_a_folder_may_have_no_template(folder, tmp_path):
    assert ChatTemplate.open(tmp_path) is None
    for path in (folder, folder / "tokenizer.json"):
        with pytest.raises(UserError, match="--chat_template=model: .* has no chat_template.jinja"):
            open_chat_template("model", path)
    with pytest.raises(UserError, match="none.jinja: cannot read the chat template"):
        open_chat_template(str(tmp_path / "none.jinja"), folder)


def test_prepared_conversations_keep_their_template(chat_tokenizer, folder, tmp_path):
    (tmp_path / "qwen.jinja").write_text(QWEN)
    template = open_chat_template(str(tmp_path / "qwen.jinja"), folder)
    records = [{"messages": [USER, ASSISTANT]}, {"prompt": "6 times 7?", "response": "It is 42."}] * 2
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [tmp_path / "chat.jsonl"], chat_tokenizer, tmp_path / "rows"
    with_template = options(transcripts=Transcripts(chat_template=template), seq_len=60)
    manifest = prepare(*arguments, with_template, workers=1)
    assert manifest["documents"] == 4 and manifest["options"]["transcripts"]["chat_template"]["source"] == QWEN
    assert prepare(*arguments, with_template, workers=1) == manifest
    with pytest.raises(UserError, match="was made with other options"):
        prepare(*arguments, options(transcripts=Transcripts(), seq_len=60), workers=1)
    row = Store(tmp_path / "rows").rows("train")[0]
    ids, flags = encode(QWEN, [USER, ASSISTANT], chat_tokenizer)
    assert row["tokens"][: len(ids)].tolist() == ids and row["responses"][: len(ids)].tolist() == flags
    assert ChatTemplate.open(tmp_path / "rows" / "tokenizer") == template
    without = prepare(*arguments[:2], tmp_path / "plain", options(transcripts=Transcripts(), seq_len=60), workers=1)
    assert "chat_template" not in without["options"]["transcripts"]  # as older versions wrote it


def test_messages_of_parquet_may_hold_what_json_cannot(chat_tokenizer):
    extra = {"at": datetime.datetime(2026, 1, 2), "raw": b"<s>", "map": [("key", "<|im_end|>")]}
    template = ChatTemplate(QWEN + "{% for m in messages %}{{ m.at }}{{ m.map | tojson if m.map }}{% endfor %}")
    record = {"messages": [USER | extra, ASSISTANT]}
    ids = transcripts.tokenize(record, Transcripts(chat_template=template), chat_tokenizer).ids
    text = text_of(ids, chat_tokenizer)
    assert text.endswith('2026-01-02 00:00:00[["key", "<|im_end|>"]]')
    assert ids.count(chat_tokenizer.special_tokens["<|im_end|>"]) == 2


def test_a_function_inside_the_function_of_a_call_is_a_bad_record(chat_tokenizer):
    call = {"function": {"name": "f", "arguments": {}, "function": None}}
    record = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(BadRecord, match="holds another 'function'"):
        transcripts.tokenize(record, Transcripts(chat_template=ChatTemplate(QWEN)), chat_tokenizer)


def test_a_message_that_is_nested_too_deeply_is_a_bad_record(chat_tokenizer):
    nested: list = []
    for _ in range(600):
        nested = [nested]
    options = Transcripts(chat_template=ChatTemplate(QWEN))
    with pytest.raises(BadRecord, match="nested too deeply"):
        transcripts.tokenize({"messages": [USER | {"meta": nested}, ASSISTANT]}, options, chat_tokenizer)


def test_a_template_changes_what_a_record_becomes(chat_tokenizer):
    record = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL], "content": None}, ASSISTANT]}
    tokens = transcripts.tokenize(record, Transcripts(chat_template=ChatTemplate(QWEN)), chat_tokenizer)
    assert (tokens.ids, tokens.in_response) == encode(
        QWEN, [USER, {"role": "assistant", "tool_calls": [CALL]}, ASSISTANT], chat_tokenizer
    )
    with pytest.raises(BadRecord, match="the assistant has tool_calls, which only a chat template can write"):
        transcripts.tokenize(record, Transcripts(), chat_tokenizer)
