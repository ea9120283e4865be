"""Conversations are read from the formats that data sets come in."""

import pytest
from chat_forms import QWEN

from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.messages import Conversation, variants
from rho1_jax.data.records import BadRecord
from rho1_jax.data.transcripts import Transcripts, encode, exchanges

USER, ASSISTANT = {"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42."}
SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "42"}
CALL = {"name": "times", "arguments": {"a": 6}}
TOOLS = [{"type": "function", "function": {"name": "times"}}]


def read(record, templated=True):
    template = ChatTemplate(QWEN) if templated else None
    return Transcripts(chat_template=template).read(record)


def share_gpt(*messages, **keys):
    return {"conversations": [{"from": sender, "value": value} for sender, value in messages], **keys}


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "6*7?", "response": "42."}, [USER, ASSISTANT]),
        ({"instruction": "6*7?", "output": "42."}, [USER, ASSISTANT]),
        ({"instruction": "6*7?", "input": "", "output": "42."}, [USER, ASSISTANT]),
        ({"instruction": "Add", "input": "1", "output": "42."}, [{"role": "user", "content": "Add\n\n1"}, ASSISTANT]),
        (share_gpt(("human", "6*7?"), ("gpt", "42.")), [USER, ASSISTANT]),
        (share_gpt(("system", "Be brief."), ("user", "6*7?"), ("assistant", "42.")), [SYSTEM, USER, ASSISTANT]),
        (share_gpt(("human", "6*7?"), ("gpt", "42."), system="Be brief."), [SYSTEM, USER, ASSISTANT]),
        ({"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"messages": share_gpt(("human", "6*7?"), ("gpt", "42."))["conversations"]}, [USER, ASSISTANT]),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": t} for t in ("4", "2.")]}]},
            [USER, ASSISTANT],
        ),
        ({"messages": [USER | {"name": None, "weight": 1}, ASSISTANT | {"tool_calls": None}]}, [USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT | {"tool_calls": []}]}, [USER, ASSISTANT]),
    ],
)
def test_every_format_gives_the_same_messages(record, expected):
    for templated in (False, True):
        assert read(record, templated) == Conversation(expected, [m["role"] == "assistant" for m in expected], None)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL | {"arguments": '{"a": 6}'}}]},
        {"from": "function_call", "value": '{"name": "times", "arguments": {"a": 6}}'},
        {"from": "function_call", "value": '[{"name": "times", "arguments": "{\\"a\\": 6}"}]'},
    ],
)
def test_tool_calls_are_given_in_every_form(message):
    if "from" in message:
        messages = [{"from": "human", "value": "6*7?"}, message, {"from": "observation", "value": "42"}]
        record = {"conversations": [*messages, {"from": "gpt", "value": "42."}], "tools": '[{"type": "x"}]'}
    else:
        record = {"messages": [USER, message, TOOL, ASSISTANT], "tools": [{"type": "x"}]}
    messages, trained, tools = read(record)
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    objects, *others = variants(messages)
    assert objects == [USER, called, TOOL, ASSISTANT]
    assert trained == [False, True, False, True] and tools == [{"type": "x"}]
    for variant, (has_content, as_text) in zip(others, [(True, False), (False, True), (True, True)]):
        assert variant[1].get("content") == ("" if has_content else None)
        assert variant[1]["tool_calls"][0]["function"]["arguments"] == ('{"a": 6}' if as_text else {"a": 6})
        assert [variant[0], *variant[2:]] == [USER, TOOL, ASSISTANT]


def test_reasoning_has_the_names_that_templates_read():
    for key in ("reasoning_content", "thinking", "reasoning"):
        messages = read({"messages": [USER, ASSISTANT | {key: "Hm."}]}).messages
        ((_, message),) = variants(messages)
        assert message["thinking"] == message["reasoning_content"] == message[key] == "Hm."


def test_a_call_of_share_gpt_is_text_without_a_chat_template():
    value = '{"name": "times", "arguments": {"a": 6}}'
    record = share_gpt(("human", "6*7?"), ("function_call", value), ("observation", "42"), ("gpt", "42."))
    (exchange,) = exchanges(record, Transcripts())
    assert [exchange.text[start:stop] for start, stop in exchange.responses] == [f"{value}\n", "```output\n", "42.\n"]


@pytest.mark.parametrize("kind", ["messages", "conversations"])
@pytest.mark.parametrize("zero", [0, 0.0])
def test_weight_0_masks_a_message(tokenizer, kind, zero):
    names = ("role", "content") if kind == "messages" else ("from", "value")
    turns = [("user", "a"), ("assistant", "Wrong."), ("tool", "42"), ("user", "b"), ("assistant", "Right.")]
    messages = [dict(zip(names, turn)) for turn in turns]
    messages[1]["weight"], messages[4]["weight"] = zero, 1
    assert read({kind: messages}, False).trained == [False, False, False, False, True]
    parts = exchanges({kind: messages}, Transcripts())
    assert [[part.text[start:stop] for start, stop in part.responses] for part in parts] == [[], ["Right.\n"]]
    ids, trained = encode(parts, tokenizer)
    flags = [flag for token, flag in zip(ids, trained) if token == tokenizer.eos_id]
    assert flags == [False, True]
    assert tokenizer.decode([token for token, flag in zip(ids, trained) if flag]) == "Right.\n"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "the weight of a message is 0.5; it must be 0 or 1"),
        ({"messages": [USER, ASSISTANT | {"weight": "0"}]}, "the weight of a message is 0; it must be 0 or 1"),
        ({"messages": [USER | {"weight": True}, ASSISTANT]}, "the weight of a message is True"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "every message from the assistant has weight 0"),
        (share_gpt(("bot", "x")), "unknown 'from' 'bot'; use one of human, gpt, observation, function_call, system"),
        (share_gpt((["x"], "x")), "unknown 'from'"),
        (share_gpt(("gpt", None)), "the assistant's content is NoneType, not text"),
        (share_gpt(("human", "x")), "no message from the assistant"),
        (share_gpt(("function_call", "times(6)")), "the value of a function_call is not JSON: 'times\\(6\\)'"),
        (share_gpt(("function_call", "[6]")), "a tool call has no function with a name"),
        (share_gpt(("human", "x"), ("gpt", "y"), tools="no"), "the key 'tools' is not JSON: 'no'"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "the key 'tools' holds dict, not a list"),
        (
            {"conversations": [{"from": "gpt"}]},
            "'conversations' must hold a list of objects with .* 'from' and 'value'",
        ),
        ({"conversations": "x"}, "'conversations' must hold a list"),
        ({"instruction": 3, "output": "x"}, "the key 'instruction' holds int, not text"),
        ({"instruction": "x", "input": 3, "output": "x"}, "the key 'input' holds int, not text"),
        ({"instruction": "x", "output": None}, "the assistant's content is NoneType, not text"),
        (
            {"messages": [USER, ASSISTANT | {"content": ["x"]}]},
            "the assistant's content has a part that is not text: str",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]},
            "the user's content has a part that is not text: image_url",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": "x"}]},
            "the tool_calls of a message must be a list of objects",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": 1}]}]},
            "a tool call has no function with a name",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": CALL | {"arguments": "{"}}]}]},
            "the arguments text of a tool call is not JSON: '{'",
        ),
    ],
)
def test_a_record_of_another_form_is_bad(record, message):
    with pytest.raises(BadRecord, match=message):
        read(record)
