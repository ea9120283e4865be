"""A model's chat template: conversations in the form that the model was trained with.

Templates are Jinja programs for Transformers' `apply_chat_template`, and get the same variables here. Special tokens
that a template writes become their ids. Text of the data never does.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NotRequired

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
from typing_extensions import TypedDict

from rho1_jax.data import tracking
from rho1_jax.data.messages import Message, variants, with_called_names
from rho1_jax.data.records import BadRecord
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.data.tokenizer_backends import Span, special_mark
from rho1_jax.data.tracking import CALL_MARK, GENERATION_END, GENERATION_START, TEMPLATE
from rho1_jax.runtime.errors import UserError, printable
from rho1_jax.runtime.files import write_text
from rho1_jax.runtime.schema import read_json
from rho1_jax.runtime.time_limit import time_limit

CHAT_TEMPLATE_FILE = "chat_template.jinja"
RENDER_SECONDS = 10.0  # of CPU time for one conversation; templates come from downloaded folders
# Log2 of the largest number, and of the most characters or items, that * and ** may make in a template.
NUMBER_BITS, REPEATED_BITS = 64, 20
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER, _FIRST_RESPONSE = tracking.OWNERS[0], tracking.OWNERS[1]  # owners: masked messages, and the first trained one


class _Named(TypedDict):
    name: str
    template: str


class _Settings(TypedDict):
    chat_template: NotRequired[str | list[_Named] | None]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, as Jinja source."""

    source: str

    @classmethod
    def open(cls, folder: pathlib.Path) -> "ChatTemplate | None":
        """The chat template of a tokenizer's folder: chat_template.jinja, or else that of tokenizer_config.json.

        Returns:
          The template called "default" if there are several; None if there is none.

        Raises:
          UserError: a file is damaged, or the template is not valid.
        """
        settings = folder / "tokenizer_config.json"
        if (folder / CHAT_TEMPLATE_FILE).is_file():
            return cls.read(folder / CHAT_TEMPLATE_FILE)
        if not settings.is_file():
            return None
        source = read_json(settings, _Settings).get("chat_template")
        if isinstance(source, list):
            source = {each["name"]: each["template"] for each in source}.get("default")
        return None if source is None else cls._checked(source, f"{settings}: chat_template")

    @classmethod
    def read(cls, path: pathlib.Path) -> "ChatTemplate":
        """The template in a file. Raises UserError if it cannot be read or is not valid."""
        try:
            source = path.read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot read the chat template: {error}") from None
        return cls._checked(source, str(path))

    @classmethod
    def _checked(cls, source: str, where: str) -> "ChatTemplate":
        try:
            _compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where}: not a Jinja template: {error.message} in line {error.lineno}") from None
        except Exception as error:  # Python refuses the code that Jinja makes of it, or constants in it fail
            raise UserError(f"{where}: not a usable Jinja template: {_reason(error)}") from None
        return cls(source)

    def save(self, folder: pathlib.Path) -> None:
        """Writes the template beside a tokenizer, where `open` and Transformers look first."""
        write_text(folder / CHAT_TEMPLATE_FILE, self.source)

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Token ids of a conversation that the assistant is to continue.

        Raises:
          BadRecord: the template refuses the conversation.
        """
        text, owners, _ = self._render(messages, [_OTHER] * len(messages), None, tokenizer, True)
        return [i for ids, _ in _encode(text, owners, [], tokenizer) for i in ids]

    def encode(
        self,
        messages: Sequence[Message],
        trained: Sequence[bool],
        tools: list[Any] | None,
        tokenizer: Tokenizer,
        enough: float = float("inf"),
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and a flag for each token: True to train on it.

        The template marks the responses with {% generation %}. Without it, a response is everything after the
        generation prompt up to the special token that ends the turn. A token belongs to a response if its last
        character does.

        Args:
          messages: the conversation.
          trained: for each message, True to train on it.
          tools: JSON schemas of the tools, for the template.
          tokenizer: the tokenizer.
          enough: stop soon after this many tokens, to bound memory and time.

        Raises:
          BadRecord: the template refuses the conversation, or changes its text beyond recognition.
        """
        # Neighbouring responses have different owners.
        owners, count = [], len(tracking.OWNERS) - 1
        for number, is_trained in enumerate(trained):
            owners.append(_FIRST_RESPONSE + number % count if is_trained else _OTHER)
        text, owner_L, generations = self._render(messages, owners, tools, tokenizer, False)
        if _GENERATION.search(self.source):
            spans = [span for span in generations if not _is_masked(owner_L[slice(*span)])]
        else:
            spans = list(self._responses(text, owner_L, tokenizer))
        all_ids: list[int] = []
        flags: list[bool] = []
        for ids, in_response in _encode(text, owner_L, spans, tokenizer):
            all_ids += ids
            flags += in_response
            if len(all_ids) > enough:
                break
        return all_ids, flags

    def _render(
        self,
        messages: Sequence[Message],
        owners: Sequence[int],
        tools: list[Any] | None,
        tokenizer: Tokenizer,
        prompt: bool,
    ) -> tuple[str, np.ndarray, list[Span]]:
        """The text of a conversation, the owner of each character, and the spans inside {% generation %}."""
        now, marker = datetime.datetime.now(), _marker(tokenizer)
        messages, expected = self._first_accepted(messages, tools, prompt, now, tokenizer)
        literals = _literals(self.source)
        tags = {literal for literal in literals if not literal.replace("_", "").isalnum()}
        for kept, kept_of_tools in (((), ()), (tags, literals)):
            marked = [marker.mark_all(message, owner, kept) for message, owner in zip(messages, owners)]
            marked_tools = marker.mark_all(tools, _OTHER, kept_of_tools)
            text = self._text(marked, marked_tools, prompt, now, tokenizer)
            text, generations = _without_generation(text)
            text, owner_L = tracking.unmark(text)
            if text == expected:
                present = set(np.unique(owner_L).tolist())
                for message, before, owner in zip(marked, messages, owners):
                    if owner >= _FIRST_RESPONSE and owner not in present and message != before:
                        raise BadRecord("the chat template does not write what the assistant says")
                return text, owner_L, generations
        raise BadRecord("the chat template changes the text of a message, so its characters cannot be tracked")

    def _first_accepted(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        prompt: bool,
        now: datetime.datetime,
        tokenizer: Tokenizer,
    ) -> tuple[list[Message], str]:
        """The first form of the messages that the template does not refuse, and their text."""
        refusals = []
        for variant in variants(messages):
            try:
                text = self._text(variant, tools, prompt, now, tokenizer)
                if count := sum(len(message.get("tool_calls", ())) for message in variant):
                    probe = self._text(with_called_names(variant, CALL_MARK), tools, prompt, now, tokenizer)
                    if probe.count(CALL_MARK) < count:
                        raise BadRecord("the chat template does not write the assistant's tool_calls")
            except BadRecord as refusal:
                refusals.append(refusal)
            else:
                return variant, _without_generation(text)[0]
        raise refusals[0]

    def _text(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        prompt: bool,
        now: datetime.datetime,
        tokenizer: Tokenizer,
    ) -> str:
        too_long = (
            f"the chat template takes more than {RENDER_SECONDS:g} s of CPU time for one conversation; use another"
        )
        try:
            with time_limit(RENDER_SECONDS, too_long):
                return _compile(self.source).render(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=prompt,
                    strftime_now=now.strftime,
                    **tokenizer.named_tokens,
                )
        except UserError:
            raise
        except Exception as error:  # a template can raise anything
            raise BadRecord(f"the chat template refuses it: {_reason(error)}") from None

    @functools.lru_cache  # noqa: B019
    def _generation_prompt(self, tokenizer: Tokenizer) -> str:
        """What the template writes before a response; empty if it writes nothing, or refuses to be asked."""
        messages, now = [{"role": "user", "content": "x"}], datetime.datetime.now()
        try:
            texts = [self._text(messages, None, prompt, now, tokenizer) for prompt in (False, True)]
        except BadRecord:
            return ""
        return texts[1].removeprefix(texts[0]) if texts[1].startswith(texts[0]) else ""

    def _responses(self, text: str, owner_L: np.ndarray, tokenizer: Tokenizer) -> Iterator[Span]:
        """The spans of the responses in a conversation, each with the token that ends its turn."""
        prompt = self._generation_prompt(tokenizer)
        data = np.flatnonzero(owner_L != TEMPLATE)
        firsts = np.flatnonzero(np.diff(owner_L[data], prepend=TEMPLATE))  # first of each owner's characters, in `data`
        bounds = [*firsts, len(data)]
        for first, after in itertools.pairwise(bounds):
            begin, last = int(data[first]), int(data[after - 1])
            if owner_L[begin] < _FIRST_RESPONSE:
                continue
            before = int(data[first - 1]) + 1 if first else 0
            following = int(data[after]) if after < len(data) else len(text)
            start = text.rfind(prompt, before, begin) if prompt else -1
            if start >= 0:
                begin = start + len(prompt)
            ends = list(_special_tokens(text[last + 1 : following], tokenizer))
            stops = [end for end in ends if end[1] in tokenizer.eos_ids] or ends
            yield begin, last + 1 + (stops[0][0][1] if stops else 0)


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


def _is_masked(owner_L: np.ndarray) -> bool:
    """True if a span holds the text of masked messages only."""
    return bool((owner_L == _OTHER).any() and not (owner_L >= _FIRST_RESPONSE).any())


def _special_tokens(text: str, tokenizer: Tokenizer) -> Iterator[tuple[Span, int]]:
    """The span and the id of each special token in a text, from left to right. The longest name wins."""
    for match in _marker(tokenizer).special.finditer(text):
        yield match.span(), tokenizer.special_tokens[match[0]]


def _marker(tokenizer: Tokenizer) -> tracking.Marker:
    return tracking.marker(tuple(tokenizer.special_tokens))


def _encode(
    text: str, owner_L: np.ndarray, spans: Sequence[Span], tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of a rendered text, with a flag for each: True if its last character is in one of the spans."""
    trained_L = np.zeros(len(text), bool)
    for begin, end in spans:
        trained_L[begin:end] = True
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4").copy()
    codes[owner_L != TEMPLATE] = ord(GENERATION_START)  # not in the name of any special token
    texts, flags, done = [], [], 0
    for (begin, end), token_id in _special_tokens(codes.tobytes().decode("utf-32-le"), tokenizer):
        mark = special_mark(token_id)
        texts += [text[done:begin], mark]
        flags += [trained_L[done:begin], np.full(len(mark), trained_L[end - 1])]
        done = end
    marked = "".join([*texts, text[done:]])
    in_response_L = np.concatenate([*flags, trained_L[done:]])
    for ids, token_spans in tokenizer.encode_parts(marked, marked=True):
        begin_T, end_T = np.array(token_spans, np.int64).reshape(-1, 2).T
        # A token that is one of several bytes of a character has an empty span.
        yield ids, in_response_L[np.maximum(begin_T, end_T - 1)].tolist()


def _without_generation(text: str) -> tuple[str, list[Span]]:
    """The text without the marks of {% generation %}, and the spans between them."""
    parts = re.split(f"[{GENERATION_START}{GENERATION_END}]", text)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return "".join(parts), list(zip(ends[::2], ends[1::2]))


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}, which marks what the model generates."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without products and powers that take all memory or never end."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        are_numbers = [isinstance(side, int | float) for side in (left, right)]
        sizes = [abs(side) if is_number else len(side) for side, is_number in zip((left, right), are_numbers)]
        bits = [math.log2(max(1, size)) for size in sizes]
        if (sum(bits) if operator == "*" else bits[0] * sizes[1]) > (
            NUMBER_BITS if all(are_numbers) else REPEATED_BITS
        ):
            raise jinja2.sandbox.SecurityError(f"{operator} makes too large a value")
        return super().call_binop(context, operator, left, right)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache
def _literals(source: str) -> frozenset[str]:
    """The strings in a template's expressions."""
    constants = _environment().parse(source).find_all(jinja2.nodes.Const)
    return frozenset(node.value.strip() for node in constants if isinstance(node.value, str) and node.value.strip())
