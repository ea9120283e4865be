"""Read conversations for fine-tuning, and mark the tokens to train on: the responses, without tool output."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rho1_jax.data import messages
from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.messages import Conversation
from rho1_jax.data.records import BadRecord
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.data.tokenizer_backends import Span
from rho1_jax.runtime.errors import UserError

# The text of each role's message, in the form of ToRA (arXiv 2309.17452). The assistant asks for the output of its
# program by opening an output block, which the tool then fills.
ROLE_TEMPLATES = {
    "system": "{content}\n\n",
    "user": "<|user|>\n{content}\n<|assistant|>\n",
    "assistant": "{content}\n",
    "tool": "```output\n{content}\n```\n",
}
RESPONDING = ("assistant", "tool")
# Tool output inside an assistant's message: everything after the block's opening line, up to its end.
_OUTPUT_BLOCK = re.compile(r"(?<=```output\n).*?(?:\n```(?:\n|$)|$)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """How to read a conversation from a record.

    Attributes:
      role_templates: (role, template with {content}), one for each of ROLE_TEMPLATES.
      prompt_key: key of the user's text, in records without messages.
      response_key: key of the assistant's text, in records without messages.
      messages_key: key of a list of {"role", "content"}, in records with messages.
      chat_template: the model's template, instead of `role_templates`.
    """

    role_templates: tuple[tuple[str, str], ...] = tuple(ROLE_TEMPLATES.items())
    prompt_key: str = "prompt"
    response_key: str = "response"
    messages_key: str = "messages"
    chat_template: ChatTemplate | None = None

    def read(self, record: dict[str, Any] | str) -> Conversation:
        """The messages in a record. Raises BadRecord if it holds no conversation, or one without a response."""
        keys = (self.prompt_key, self.response_key)
        return messages.read(record, keys, self.messages_key, self.chat_template is not None)


def parse_role_templates(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """ROLE_TEMPLATES with the replacements "ROLE=TEMPLATE". A backslash and an n stand for a line break.

    Raises:
      UserError: a role is unknown, or a template does not hold {content} exactly once.
    """
    templates = dict(ROLE_TEMPLATES)
    for text in texts:
        role, _, template = text.partition("=")
        if role not in templates or template.count("{content}") != 1:
            known = ", ".join(templates)
            raise UserError(
                f"--role_template={text!r} is not ROLE=TEMPLATE; ROLE must be one of {known}, and TEMPLATE must hold "
                "{content} exactly once"
            )
        templates[role] = template.replace("\\n", "\n")
    return tuple(templates.items())


class Exchange(NamedTuple):
    """A user's message and the responses to it."""

    text: str
    responses: list[Span]  # the characters to train on
    train_eos: bool  # False if the last response has weight 0


class Tokens(NamedTuple):
    """A tokenized conversation: its text, its token ids, and a flag for each token, True to train on it."""

    text: str
    ids: list[int]
    in_response: list[bool]


def tokenize(
    record: dict[str, Any] | str, options: Transcripts, tokenizer: Tokenizer, enough: float = math.inf
) -> Tokens:
    """Tokenizes the conversation in a record.

    Args:
      record: a record that `records.parse` returned.
      options: how to read it.
      tokenizer: the tokenizer.
      enough: stop soon after this many tokens, to bound memory and time.

    Returns:
      The tokens. With a chat template, `text` is that of the messages as JSON, which does not depend on the date.

    Raises:
      BadRecord: the record holds no conversation, or one without a response.
    """
    if options.chat_template is None:
        parts = exchanges(record, options)
        return Tokens("".join(part.text for part in parts), *encode(parts, tokenizer, enough))
    try:
        conversation = options.read(record)
        ids, in_response = options.chat_template.encode(*conversation, tokenizer, enough)
        return Tokens(json.dumps([conversation.messages, conversation.tools]), ids, in_response)
    except RecursionError:
        raise BadRecord("nested too deeply") from None


def exchanges(record: dict[str, Any] | str, options: Transcripts) -> list[Exchange]:
    """The conversation in a record. A new exchange starts when a user or the system speaks after a response.

    Raises:
      BadRecord: the record holds no conversation, or one without a response.
    """
    templates = {role: template.split("{content}") for role, template in options.role_templates}
    parts: list[list[str]] = []  # the texts of each exchange
    responses: list[list[Span]] = []
    train_eos: list[bool] = []
    length, last_role = 0, "assistant"
    conversation = options.read(record)
    for message, is_trained in zip(conversation.messages, conversation.trained):
        role, content = message["role"], message["content"]
        if not parts or (role not in RESPONDING and last_role in RESPONDING):
            parts.append([])
            responses.append([])
            train_eos.append(True)
            length = 0
        last_role = role
        before, after = templates[role]
        if role == "assistant":
            train_eos[-1] = is_trained
            if is_trained:
                responses[-1] += _without_output(length + len(before), content + after)
        elif role == "tool" and train_eos[-1]:
            responses[-1].append((length, length + len(before)))
        parts[-1].append(before + content + after)
        length += len(parts[-1][-1])
    return [Exchange("".join(texts), spans, eos) for texts, spans, eos in zip(parts, responses, train_eos)]


def _without_output(start: int, text: str) -> list[Span]:
    """The spans of an assistant's text without the tool output in it. The text begins at character `start`."""
    spans, first = [], 0
    for block in _OUTPUT_BLOCK.finditer(text):
        spans.append((start + first, start + block.start()))
        first = block.end()
    return [*spans, (start + first, start + len(text))]


def encode(
    conversation: list[Exchange], tokenizer: Tokenizer, enough: float = math.inf
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, with EOS after each exchange, and a flag for each token: True to train on it.

    The flag is True for EOS after a response, and for each token whose last character is part of a response.

    Args:
      conversation: its exchanges.
      tokenizer: the tokenizer.
      enough: stop soon after this many tokens, to bound memory and time.
    """
    ids, in_response = tokenizer.prefix(), [False] * len(tokenizer.prefix())
    for exchange in conversation:
        starts, stops = np.array(exchange.responses, np.int64).reshape(-1, 2).T
        for part_ids, spans in tokenizer.encode_parts(exchange.text):
            begin, end = np.array(spans, np.int64).reshape(-1, 2).T
            # A token that is one of several bytes of a character has an empty span.
            last = np.maximum(begin, end - 1)
            response = np.searchsorted(starts, last, side="right") - 1  # the last response that starts before
            in_response += ((response >= 0) & (last < np.append(stops, 0)[response])).tolist()
            ids += part_ids
            if len(ids) > enough:
                return ids, in_response
        ids.append(tokenizer.eos_id)
        in_response.append(exchange.train_eos)
    return ids, in_response
