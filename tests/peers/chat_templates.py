"""Token ids of conversations in the chat templates of a folder, beside those of Transformers.

PYTHONPATH=tests python tests/peers/chat_templates.py --templates=DIR [--verbose]

DIR holds *.jinja files, such as models/templates of llama.cpp or trl/chat_templates of TRL. Each template renders the
conversations below with and without tools and with and without the generation prompt. The tokenizer is a byte-level
one that knows the special tokens of every template. Prints a row of a Markdown table for each template:

  equal             both give the same token ids
  refused           both refuse the conversation
  no calls          the template leaves tool calls out, which only ours refuses
  only one refused  one of the two refuses the conversation
  differ            the token ids differ

--verbose prints the last two. A template that refuses tool calls without "content", or arguments that are not text,
gets the form it wants, as in `rho1 prepare`.
"""

import argparse
import collections
import itertools
import json
import pathlib
import re
import tempfile

import tokenizers
import transformers
from chat_forms import make_tokenizer

from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.messages import read_prompt
from rho1_jax.data.records import BadRecord
from rho1_jax.data.tokenizer import Tokenizer

OUTCOMES = ("equal", "refused", "no calls", "only one refused", "differ")
# <|im_end|>, <｜User｜>, <start_of_turn>, [INST], <<SYS>>, <SPECIAL_12>
SPECIAL = re.compile(r"<\|[\w.:/ -]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|<</?SYS>>|<SPECIAL_\d+>")

SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": "What is 6 times 7?"}
ASSISTANT = {"role": "assistant", "content": " It is 42.\n"}
UNICODE = {"role": "user", "content": "  Thanks! 日本語 \N{GRINNING FACE} é\n\n\ttab 'quoted' \"too\" \\ "}
FUNCTION = {"name": "times", "arguments": {"a": 6, "b": ["7", '"x"\\ é']}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "id": "abcdef012", "function": FUNCTION}],
}
REPLY = {"role": "tool", "name": "times", "tool_call_id": "abcdef012", "content": "42"}
TWO_CALLS = CALL | {
    "content": "Twice:",
    "tool_calls": CALL["tool_calls"] + [CALL["tool_calls"][0] | {"id": "abcdef345"}],
}
CONVERSATIONS = {
    "one turn": [USER],
    "answered": [USER, ASSISTANT],
    "system": [SYSTEM, USER, ASSISTANT, USER],
    "long": [SYSTEM, USER, ASSISTANT, UNICODE, ASSISTANT, USER, ASSISTANT],
    "unicode": [UNICODE, ASSISTANT | {"content": "\N{GRINNING FACE}"}, UNICODE],
    "two assistants": [USER, ASSISTANT, ASSISTANT],
    "thoughts": [USER, ASSISTANT | {"content": "<think>\nHm, 42?\n</think>\n\nIt is 42."}, USER],
    "reasoning": [USER, ASSISTANT | {"reasoning_content": "Hm."}, USER, ASSISTANT | {"reasoning_content": "Hm?"}],
    "call": [USER, CALL],
    "called": [SYSTEM, USER, CALL, REPLY],
    "called, answered": [USER, CALL, REPLY, ASSISTANT, UNICODE],
    "two calls": [USER, TWO_CALLS, REPLY, REPLY | {"tool_call_id": "abcdef345"}, ASSISTANT],
}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "number", "description": "é"}, "b": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "times", "description": "a*b", "parameters": PARAMETERS}}


def make_peers(folder: pathlib.Path, sources: list[str]) -> tuple[Tokenizer, transformers.PreTrainedTokenizerFast]:
    """Our tokenizer and Transformers', of one file that knows the special tokens in the templates."""
    make_tokenizer(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(sorted({name for source in sources for name in SPECIAL.findall(source)}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def theirs(peer, messages: list, **options) -> list[int]:
    """Transformers' token ids: of the messages as they are, or else with calls in another form that our command tries.

    Raises the template's refusal of the first form.
    """
    refusals = []
    for as_text, content in ((False, {}), (False, {"content": ""}), (True, {}), (True, {"content": ""})):
        changed = [
            content
            | {key: value for key, value in message.items() if value is not None}
            | {"tool_calls": [in_form(call, as_text) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]
        try:
            return peer.apply_chat_template(changed, return_dict=False, **options)
        except Exception as refusal:  # a template can raise anything
            refusals.append(refusal)
    raise refusals[0]


def in_form(call: dict, as_text: bool) -> dict:
    """A tool call with its arguments as an object or as JSON text."""
    arguments = call["function"]["arguments"]
    if as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}


def compare(template: str, messages: list, tools: list | None, prompt: bool, tokenizer, peer) -> tuple[str, str]:
    """The outcome for one conversation, and an explanation."""
    expected, ids, reasons = None, None, []
    options = {"tools": tools, "chat_template": template, "add_generation_prompt": prompt}
    try:
        expected = theirs(peer, messages, **options)
    except Exception as refusal:  # a template can raise anything
        reasons.append(f"Transformers: {refusal}")
    conversation, ours = read_prompt({"messages": messages, "tools": tools}), ChatTemplate(template)
    try:
        if prompt:
            ids = ours.prompt_ids(conversation.messages, tokenizer, conversation.tools)
        else:
            trained = [message["role"] == "assistant" for message in conversation.messages]
            ids, _ = ours.encode(conversation.messages, trained, conversation.tools, tokenizer)
    except BadRecord as refusal:
        reasons.append(f"ours: {refusal}")
    if expected is None or ids is None:
        both, without_calls = (
            expected is None and ids is None,
            "does not write the assistant's tool_calls" in reasons[-1],
        )
        outcome = "refused" if both else "no calls" if without_calls else "only one refused"
        return outcome, "; ".join(reasons)
    return ("equal" if ids == expected else "differ"), f"{peer.decode(ids)!r}\n     {peer.decode(expected)!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=pathlib.Path, required=True)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    sources = {path.stem: path.read_text() for path in sorted(options.templates.glob("*.jinja"))}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, peer = make_peers(pathlib.Path(folder), list(sources.values()))
        print("| template |", " | ".join(OUTCOMES), "|\n|", " --- |" * (1 + len(OUTCOMES)))
        totals = collections.Counter()
        for name, source in sources.items():
            counts = collections.Counter()
            for title, messages in CONVERSATIONS.items():
                for tools, prompt in itertools.product((None, [TOOL]), (False, True)):
                    outcome, why = compare(source, messages, tools, prompt, tokenizer, peer)
                    counts[outcome] += 1
                    if options.verbose and outcome in OUTCOMES[-2:]:
                        print(f"  {name}: {title}, tools={bool(tools)}, prompt={prompt}: {outcome}: {why}"[:1500])
            print(f"| {name} |", " | ".join(str(counts[outcome]) for outcome in OUTCOMES), "|", flush=True)
            totals += counts
        print(f"| {len(sources)} templates |", " | ".join(str(totals[outcome]) for outcome in OUTCOMES), "|")


if __name__ == "__main__":
    main()
