"""Token ids of conversations in the chat templates of a folder, beside those of Transformers.

python tests/peers/chat_templates.py --templates=DIR [--verbose]

DIR holds *.jinja files, such as models/templates of llama.cpp or trl/chat_templates of TRL. Each template renders the
conversations below with and without tools and with and without the generation prompt. The tokenizer is a byte-level
one that knows the special tokens of every template. Prints a row of a Markdown table for each template:

  equal          both give the same token ids
  refused        both refuse the conversation
  converted      only Transformers refuses it, or leaves the calls out: ours converts tool calls and their arguments
  only refused   only ours refuses it; --verbose prints why
  differ         the token ids differ
"""

import argparse
import collections
import pathlib
import re
import tempfile

import tokenizers
import transformers
from chat_forms import TEXTS, make_tokenizer

from rho1_jax.data import messages
from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.records import BadRecord
from rho1_jax.data.tokenizer import Tokenizer

OUTCOMES = ("equal", "refused", "converted", "only refused", "differ")
# <|im_end|>, <｜User｜>, <start_of_turn>, [INST], <<SYS>>, <SPECIAL_12>, ]~b]
SPECIAL = re.compile(r"<\|[\w.:/ -]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|<</?SYS>>|<SPECIAL_\d+>")

SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": "What is 6 times 7?"}
ASSISTANT = {"role": "assistant", "content": " It is 42.\n"}
UNICODE = {"role": "user", "content": "  Thanks! 日本語 \N{GRINNING FACE} é\n\n\ttab 'quoted' \"too\" \\ "}
FUNCTION = {"name": "times", "arguments": {"a": 6, "b": ["7", '"x"\\ é']}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "abcdef012", "function": FUNCTION}]}
REPLY = {"role": "tool", "name": "times", "tool_call_id": "abcdef012", "content": "42"}
TWO_CALLS = CALL | {"content": "Twice:", "tool_calls": CALL["tool_calls"] + [CALL["tool_calls"][0] | {"id": "abcdef345"}]}
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


def compare(template: str, conversation: list, tools: list | None, prompt: bool, tokenizer: Tokenizer, peer) -> tuple[str, str]:
    """The outcome for one conversation, and what explains it."""
    try:
        expected = peer.apply_chat_template(
            conversation, tools=tools, chat_template=template, add_generation_prompt=prompt, return_dict=False
        )
    except Exception as error:  # a template can raise anything
        expected, refusal = None, str(error)
    record = {"messages": conversation, "tools": tools}
    try:
        if prompt:
            ids = ChatTemplate(template).prompt_ids([messages._message(m, True) for m in conversation], tokenizer)
        else:
            read = [messages._message(message, True) for message in conversation]
            ids, _ = ChatTemplate(template).encode(read, [m["role"] == "assistant" for m in read], tools, tokenizer)
    except BadRecord as error:
        return ("refused" if expected is None else "only refused"), str(error)
    if expected is None:
        return "converted", refusal
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
        for name, source in sources.items():
            counts = collections.Counter()
            for title, conversation in CONVERSATIONS.items():
                for tools, prompt in ((None, False), (None, True), ([TOOL], False)):
                    outcome, why = compare(source, conversation, tools, prompt, tokenizer, peer)
                    counts[outcome] += 1
                    if options.verbose and outcome not in ("equal", "refused"):
                        print(f"  {name}: {title}, tools={bool(tools)}, prompt={prompt}: {outcome}: {why}"[:1500])
            print(f"| {name} |", " | ".join(str(counts[outcome]) for outcome in OUTCOMES), "|", flush=True)


if __name__ == "__main__":
    main()
