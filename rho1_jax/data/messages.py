"""Reads conversations from records in common formats: messages, ShareGPT, Alpaca, or prompt and response."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rho1_jax.data.records import BadRecord, check_text, missing_keys

ROLES = ("system", "user", "assistant", "tool")
SHARE_GPT_KEY = "conversations"
SHARE_GPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    **{role: role for role in ROLES},
}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # templates read the first or the second
ALPACA_KEYS = ("instruction", "output")

Message = dict[str, Any]  # "role", "content" (optional beside "tool_calls"), and other keys for chat templates


class Conversation(NamedTuple):
    """The messages of a conversation.

    Attributes:
      messages: the messages, in order.
      trained: for each message, True to train on it.
      tools: JSON schemas of the tools; None if there are none.
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[Any] | None


def read(record: dict[str, Any] | str, keys: Sequence[str], messages_key: str, templated: bool) -> Conversation:
    """The conversation in a record.

    Args:
      record: a record that `records.parse` returned.
      keys: keys of the user's and the assistant's text, in records without messages.
      messages_key: key of the messages.
      templated: True for a chat template, which can write tool calls.

    Raises:
      BadRecord: the record holds no conversation, or none to train on.
    """
    if isinstance(record, str):
        raise BadRecord("plain text, not a conversation")
    if messages_key in record:
        raw = _listed(record, messages_key)
    elif record.keys() >= set(keys):
        raw = [{"role": "user", "content": record[keys[0]]}, {"role": "assistant", "content": record[keys[1]]}]
    elif SHARE_GPT_KEY in record:
        raw = _listed(record, SHARE_GPT_KEY)
    elif record.keys() >= set(ALPACA_KEYS):
        raw = _alpaca(record)
    else:
        raise missing_keys(record, [[messages_key], keys, [SHARE_GPT_KEY], ALPACA_KEYS])
    messages = [_message(message, templated) for message in raw]
    trained = [message["role"] == "assistant" and weight != 0 for message, weight in zip(messages, map(_weight, raw))]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecord("no message from the assistant: there is nothing to train on")
    if not any(trained):
        raise BadRecord("every message from the assistant has weight 0: there is nothing to train on")
    if not templated:
        return Conversation(messages, trained, None)
    return Conversation(_as_json(messages), trained, _as_json(_tools(record)))


def _as_json(value: Any) -> Any:
    """A value as JSON can hold it. Parquet has dates, bytes and maps too, which become text or lists."""
    return json.loads(json.dumps(value, default=str))


def _listed(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The messages under a key. ShareGPT's are converted to messages with a role."""
    messages = record[key]
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        if all(message.keys() >= {"role", "content"} or message.get("tool_calls") for message in messages):
            return messages
        if all(message.keys() >= {"from", "value"} for message in messages):
            system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
            return system + [_share_gpt(message) for message in messages]
    raise BadRecord(
        f"the key {key!r} must hold a list of objects with 'role' and 'content', or with 'from' and 'value'"
    )


def _share_gpt(message: dict[str, Any]) -> dict[str, Any]:
    sender, value = message["from"], message["value"]
    if not isinstance(sender, str) or sender not in SHARE_GPT_ROLES:
        raise BadRecord(f"unknown 'from' {str(sender)[:50]!r}; use one of {', '.join(SHARE_GPT_ROLES)}")
    converted = {"role": SHARE_GPT_ROLES[sender], "content": value, "weight": message.get("weight")}
    return converted | ({"function_call": value} if sender == "function_call" else {})


def _alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    instruction, given = record["instruction"], record.get("input") or ""
    for key, text in (("instruction", instruction), ("input", given)):
        if not isinstance(text, str):
            raise BadRecord(f"the key {key!r} holds {type(text).__name__}, not text")
    question = f"{instruction}\n\n{given}" if given else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _weight(message: dict[str, Any]) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRecord(f"the weight of a message is {str(weight)[:50]}; it must be 0 or 1")
    return weight


def _message(message: dict[str, Any], templated: bool) -> Message:
    """A message with its text in one piece and its tool calls as objects."""
    role = message.get("role")
    if not isinstance(role, str):
        raise BadRecord(f"the role of a message is {type(role).__name__}, not text")
    if role not in ROLES:
        raise BadRecord(f"unknown role {role[:50]!r}; use one of {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if "function_call" in message and templated:
        content, calls = None, _share_gpt_calls(message["function_call"])
    if calls and not templated:
        raise BadRecord(f"the {role} has tool_calls, which only a chat template can write; set --chat_template")
    if isinstance(content, list):
        content = "".join(_part(part, role) for part in content)
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRecord(f"the {role}'s content is {type(content).__name__}, not text")
    check_text(content or "")
    others = {key: value for key, value in message.items() if value is not None}
    for key in ("weight", "content", "tool_calls", "function_call"):
        others.pop(key, None)
    text = {} if content is None else {"content": content}
    return others | text | ({"tool_calls": _calls(calls)} if calls else {})


def _part(part: Any, role: str) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadRecord(f"the {role}'s content has a part that is not text: {str(kind)[:50]}")


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Checks tool calls and returns them."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRecord("the tool_calls of a message must be a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord("a tool call has no function with a name")
        if function is not call and "function" in function:
            raise BadRecord("the function of a tool call holds another 'function'")
        _json(function.get("arguments"), "the arguments text of a tool call")
    return calls


def with_called_names(messages: Sequence[Message], suffix: str) -> list[Message]:
    """The messages with a suffix added to the name of every called function."""

    def renamed(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return call | {"function": renamed(call["function"])}
        return call | {"name": call["name"] + suffix}

    return [
        message | {"tool_calls": [renamed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def variants(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yields the messages with their tool calls in each form that chat templates expect.

    Most templates take the arguments as an object, some as JSON text. Some need the key "content". Reasoning is copied
    to the keys that templates read.
    """
    messages = [_with_reasoning(message) for message in messages]
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    for as_text, content in ((False, {}), (False, {"content": ""}), (True, {}), (True, {"content": ""})):
        yield [
            content | message | {"tool_calls": [_with_arguments(call, as_text) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]


def _with_reasoning(message: Message) -> Message:
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _with_arguments(call["function"], as_text)}
    arguments = call.get("arguments") or {}
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"arguments": arguments if as_text else _json(arguments, "the arguments text of a tool call")}


def _share_gpt_calls(text: Any) -> list[dict[str, Any]]:
    calls = _json(text, "the value of a function_call")
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _tools(record: dict[str, Any]) -> list[Any] | None:
    tools = _json(record.get("tools") or [], "the key 'tools'")
    if not isinstance(tools, list):
        raise BadRecord(f"the key 'tools' holds {type(tools).__name__}, not a list")
    return tools or None


def _json(value: Any, what: str) -> Any:
    """A JSON value, parsed if it is given as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRecord(f"{what} is not JSON: {value[:50]!r}") from None
