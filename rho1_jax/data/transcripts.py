"""Fine-tuning records: a prompt with its response, or messages with tool output, and which of it is trained on."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rho1_jax.data.records import BadRecord, check_text
from rho1_jax.data.tokenizer import Span, Tokenizer
from rho1_jax.runtime.errors import UserError

# How each role's message is written down, in the form of ToRA (arXiv 2309.17452). The assistant asks for the output
# of its program by opening the block that the tool then fills.
ROLE_TEMPLATES = {
    "system": "{content}\n\n",
    "user": "<|user|>\n{content}\n<|assistant|>\n",
    "assistant": "{content}\n",
    "tool": "```output\n{content}\n```\n",
}
RESPONDING = ("assistant", "tool")
# Tool output written into an assistant's message: all behind the opening of the block, up to its end.
_OUTPUT_BLOCK = re.compile(r"(?<=```output\n).*?(?:\n```(?:\n|$)|$)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """Where a record holds its conversation.

    Attributes:
      role_templates: (role, template with {content}), one for each of ROLE_TEMPLATES.
      prompt_key: of records without messages: the key of the user's text.
      response_key: of the assistant's.
      messages_key: of records with messages: the key of a list of {"role", "content"}.
    """

    role_templates: tuple[tuple[str, str], ...] = tuple(ROLE_TEMPLATES.items())
    prompt_key: str = "prompt"
    response_key: str = "response"
    messages_key: str = "messages"


def parse_role_templates(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """ROLE_TEMPLATES with those that "ROLE=TEMPLATE" replace; a backslash and n stand for a line break.

    Raises:
      UserError: one names no known role, or does not hold {content} once.
    """
    templates = dict(ROLE_TEMPLATES)
    for text in texts:
        role, _, template = text.partition("=")
        if role not in templates or template.count("{content}") != 1:
            known = ", ".join(templates)
            raise UserError(f"--role_template {text!r} is not ROLE=TEMPLATE with {{content}} once, a role of {known}")
        templates[role] = template.replace("\\n", "\n")
    return tuple(templates.items())


class Exchange(NamedTuple):
    """What users said, and the answer to it."""

    text: str
    responses: list[Span]  # the characters that are trained on


def _messages(record: dict[str, Any] | str, options: Transcripts) -> list[tuple[str, str]]:
    if isinstance(record, str):
        raise BadRecord("plain text, which holds no conversation")
    keys = (options.prompt_key, options.response_key)
    if options.messages_key in record:
        messages = record[options.messages_key]
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and message.keys() >= {"role", "content"} for message in messages
        ):
            raise BadRecord(f"the key {options.messages_key!r} holds no list of objects with 'role' and 'content'")
        found = [(message["role"], message["content"]) for message in messages]
    elif record.keys() >= set(keys):
        found = [("user", record[keys[0]]), ("assistant", record[keys[1]])]
    else:
        wanted = f"{options.messages_key!r}, nor {keys[0]!r} and {keys[1]!r}"
        raise BadRecord(f"lacks the key {wanted}; it has {', '.join(map(repr, record)) or 'none'}")
    for role, content in found:
        if role not in dict(options.role_templates):
            raise BadRecord(f"unknown role {role!r}: known are {', '.join(ROLE_TEMPLATES)}")
        if not isinstance(content, str):
            raise BadRecord(f"the {role}'s content is {type(content).__name__}, not text")
        check_text(content)
    if not any(role == "assistant" for role, _ in found):
        raise BadRecord("no message of the assistant: there is nothing to train on")
    return found


def exchanges(record: dict[str, Any] | str, options: Transcripts) -> list[Exchange]:
    """A record's conversation, divided where a user speaks after an assistant.

    Raises:
      BadRecord: it holds none, or one without a response.
    """
    templates = dict(options.role_templates)
    found: list[Exchange] = []
    last_role = "assistant"
    for role, content in _messages(record, options):
        if not found or (role not in RESPONDING and last_role in RESPONDING):
            found.append(Exchange("", []))
        last_role = role
        before, after = templates[role].split("{content}")
        start = len(found[-1].text)
        spans: list[Span] = []
        if role == "assistant":
            spans = _without_output(start + len(before), content + after)
        elif role == "tool":
            spans = [(start, start + len(before))]
        found[-1] = Exchange(found[-1].text + before + content + after, found[-1].responses + spans)
    return found


def _without_output(start: int, text: str) -> list[Span]:
    """The spans of an assistant's text, which begins at character `start`, without the tool output in it."""
    spans, first = [], 0
    for block in _OUTPUT_BLOCK.finditer(text):
        spans.append((start + first, start + block.start()))
        first = block.end()
    return [*spans, (start + first, start + len(text))]


def encode(found: list[Exchange], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, each exchange ended by EOS, and which of them are trained on.

    A token is trained on where its last character is; so is the EOS.
    """
    ids, trained = tokenizer.prefix(), [False] * len(tokenizer.prefix())
    for exchange in found:
        exchange_ids, spans = tokenizer.encode_spans(exchange.text)
        ids += [*exchange_ids, tokenizer.eos_id]
        # One of several bytes of a character covers no characters itself.
        last_characters = [max(begin, end - 1) for begin, end in spans]
        trained += [any(start <= last < stop for start, stop in exchange.responses) for last in last_characters]
        trained.append(True)
    return ids, trained
