"""Continues prompts with a model, or chats with it in the terminal.

rho1 generate --checkpoint=DIR --prompt='2+2=' [--prompt=...] [--max_new_tokens=256] [--temperature=0.7 --top_p=0.9]
rho1 generate --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl [--stop='\\n\\n']
rho1 generate --checkpoint=DIR --chat [--system=TEXT]
rho1 generate --checkpoint=DIR --chat --prompts=FILE.jsonl --output=FILE.jsonl

DIR is a run, one of its checkpoints, or a Hugging Face folder. Text is printed while it is generated if there is one
prompt. --chat puts every prompt into the model's chat template. Without a prompt it reads your messages: /clear forgets
the conversation, /exit or Ctrl-D ends it, and Ctrl-C stops an answer.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, cast

import jax
import pydantic
from absl import flags
from typing_extensions import TypedDict

from rho1_jax.configs.default import Dtype
from rho1_jax.data import records
from rho1_jax.data.chat_template import ChatTemplate, Message
from rho1_jax.models import decoder
from rho1_jax.models.generation import Continuation, Generator, Prompt
from rho1_jax.models.terminal import chat as chat_on_terminal
from rho1_jax.models.terminal import for_terminal, stream
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, local_path, write_text
from rho1_jax.runtime.progress import Progress, waiting
from rho1_jax.runtime.schema import parse_json
from rho1_jax.training.pretrained import Pretrained

CHECKPOINT = "--checkpoint"
MAX_NEW_TOKENS, CHAT_MAX_NEW_TOKENS = 256, 1024
STREAM_STRETCH = 4  # tokens between two pieces of text that are printed
CHAT_SHORTEST = 256  # a conversation grows, and each new length is compiled


class _Message(TypedDict):
    """A message in a file. Templates may use other keys."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    role: str
    content: str


_Conversation = Annotated[list[_Message], pydantic.Field(min_length=1)]


def generate_text(
    checkpoint: str | pathlib.Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stops: Sequence[str] = (),
    dtype: str | None = None,
) -> list[Continuation]:
    """Continues each prompt until an end-of-sequence token, a stop string, or `max_new_tokens`.

    Args:
      checkpoint: a run directory (its newest checkpoint), one of its checkpoints, or a Hugging Face folder.
      prompts: the texts to continue, or their token ids.
      max_new_tokens: longest continuation.
      temperature: 0 takes the likeliest token; above 0, tokens are sampled.
      top_p: sample from the fewest tokens whose probabilities reach this.
      seed: seed of the samples.
      stops: strings that end a continuation, and are not part of it.
      dtype: "float32" or "bfloat16" for parameters and computation; None: float32 parameters, the run's compute dtype.

    Returns:
      For each prompt its continuation: text, token ids and log-probabilities, without the prompt.

    Raises:
      UserError: there is no model, or a prompt is empty.
    """
    with _loaded(Pretrained.open(checkpoint, CHECKPOINT), len(prompts), dtype) as generator:
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        requests = deque(enumerate(prompts))
        return sorted(generator.run(requests, max_new_tokens=max_new_tokens, stops=stops, **options))


@contextlib.contextmanager
def _loaded(model: Pretrained, prompts: int, dtype: str | None, **options: int) -> Iterator[Generator]:
    """A generator with the parameters of a model, inside its mesh."""
    config, model_config, tokenizer = model.config, model.model, model.tokenizer()
    mesh = sharding.mesh_of_run(**config.mesh)
    if dtype:
        model_config = dataclasses.replace(model_config, compute_dtype=cast(Dtype, dtype))
    with jax.set_mesh(mesh):
        rows = max(1, min(prompts, config.eval.generate_batch))
        with contextlib.nullcontext() if model.folder else waiting("reading the checkpoint"):
            params = model.load(mesh, dtype or "float32")
            generator = Generator(decoder.build(model_config), params, tokenizer, rows, **options)
        yield generator


def read_items(path: pathlib.Path, chat: bool) -> list[dict[str, Any]]:
    """The prompts of a file: each line of a text file, or each record of a JSON lines file.

    Returns:
      For each {"prompt": text} or, in a chat, {"messages": [...]} if the record has that key.

    Raises:
      UserError: the file is missing or holds no prompt, or a record is bad (with file and line).
    """
    prompts: list[dict[str, Any]] = []
    for file in records.expand([str(path)]):
        for line, raw, _ in records.read(file):
            try:
                record = records.parse(file, raw)
                if chat and isinstance(record, dict) and "messages" in record:
                    where = f"{file}:{line}: messages"
                    prompts.append(
                        {"messages": parse_json(json.dumps(record["messages"], default=str), _Conversation, where)}
                    )
                    continue
                text = records.document(record, ["{prompt}"])
            except records.BadRecord as error:
                raise UserError(f"{file}:{line}: {error}") from None
            texts = [text] if records.file_format(file) != "text" else filter(None, text.split("\n"))
            prompts += [{"prompt": text} for text in texts]
    if not prompts:
        raise UserError(f"{path}: no prompts")
    return prompts


def _checked(text: str, flag: str) -> str:
    """The text of a flag. Raises UserError if the shell passed bytes that are not UTF-8."""
    try:
        records.check_text(text)
    except records.BadRecord:
        raise UserError(f"{flag}: not UTF-8 text") from None
    return text


def _chat_encoder(model: Pretrained, system: str | None) -> Callable[[list[Message]], list[int]]:
    """A function that gives the token ids of a conversation. Raises UserError if the model has no chat template.

    The function raises BadRecord if the template refuses a conversation.
    """
    template, tokenizer = ChatTemplate.open(model.tokenizer_path), model.tokenizer()
    if template is None:
        raise UserError(
            f"--chat: {model.tokenizer_path} has no chat template; use a model that was trained to chat, add its "
            "chat_template.jinja there, or leave --chat out"
        )

    def encode(messages: list[Message]) -> list[int]:
        before: list[Message] = [{"role": "system", "content": system}] if system else []
        return template.prompt_ids(messages if messages[0]["role"] == "system" else before + messages, tokenizer)

    return encode


def _encode_all(items: list[dict[str, Any]], encode: Callable[[list[Message]], list[int]]) -> list[list[int]]:
    """The token ids of each prompt. Raises UserError, with its number, if the template refuses one."""
    prompts = []
    for number, item in enumerate(items, start=1):
        try:
            prompts.append(encode(item.get("messages") or [{"role": "user", "content": item["prompt"]}]))
        except records.BadRecord as error:
            raise UserError(f"--chat: prompt {number}: {error}") from None
    return prompts


def _print_one(generator: Generator, shown: str, prompt: Prompt, **options: Any) -> None:
    """Prints a prompt and its continuation while it is generated."""
    pieces = [for_terminal(shown)]  # waits for the first piece, so that the line on standard error can be erased

    def show(text: str) -> None:
        print(*pieces, for_terminal(text), sep="", end="", flush=True)
        pieces.clear()

    stream(generator, 0, prompt, show, **options)
    print(*pieces, sep="")


def _continue_all(generator: Generator, prompts: Sequence[Prompt], **options: Any) -> list[Continuation]:
    """The continuations in the order of the prompts, with progress on standard error."""
    continuations, tokens = [], 0
    with Progress("generating", len(prompts), unit="prompts") as progress:

        def count(new: int) -> None:
            nonlocal tokens
            tokens += new
            progress.advance(0, f"{tokens:,} tokens")

        for continuation in generator.run(deque(enumerate(prompts)), on_tokens=count, **options):
            continuations.append(continuation)
            progress.advance(1, f"{tokens:,} tokens")
    return sorted(continuations)


def main() -> None:
    """The command: parses the flags, and prints or writes continuations, or chats."""
    path = flags.DEFINE_string(
        "checkpoint", None, "A run directory, one of its checkpoints, or a Hugging Face folder.", required=True
    )
    prompt = flags.DEFINE_multi_string("prompt", [], "Text to continue. May be given several times.")
    file = flags.DEFINE_string(
        "prompts", None, 'JSON lines with "prompt", or "messages" with --chat, or text with one prompt a line.'
    )
    output = flags.DEFINE_string("output", None, "JSON lines file to write. By default, texts are printed.")
    chat = flags.DEFINE_boolean(
        "chat", False, "Put prompts into the model's chat template. Without prompts, chat in the terminal."
    )
    system = flags.DEFINE_string("system", None, "System prompt of a chat.")
    max_new_tokens = flags.DEFINE_integer(
        "max_new_tokens", None, "Longest continuation. By default 256, or 1024 with --chat.", 1
    )
    temperature = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token; above 0: sample.", lower_bound=0.0)
    top_p = flags.DEFINE_float(
        "top_p", 1.0, "Sample from the fewest tokens whose probabilities reach this (nucleus sampling).", 0.0, 1.0
    )
    seed = flags.DEFINE_integer("seed", 0, "Seed of the samples.", -(2**63), 2**63 - 1)
    stop = flags.DEFINE_multi_string("stop", [], r"String that ends a continuation; '\n' is a line break. Repeatable.")
    dtype = flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Dtype of parameters and computation. By default, float32 parameters and the run's compute_dtype.",
    )

    def command() -> None:
        output_path = local_path(output.value, "--output") if output.value else None
        items: list[dict[str, Any]] = [{"prompt": _checked(text, "--prompt")} for text in prompt.value]
        items += read_items(local_path(file.value, "--prompts"), chat.value) if file.value else []
        if not items and not chat.value:
            raise UserError("nothing to continue: give --prompt=TEXT, --prompts=FILE or --chat")
        if not items and output_path:
            raise UserError("--output needs --prompt=TEXT or --prompts=FILE")
        if system.value and not chat.value:
            raise UserError("--system needs --chat: without it, a prompt is continued as it is")
        if top_p.value < 1 and not temperature.value:
            raise UserError(f"--top_p={top_p.value} needs --temperature above 0: at 0, the likeliest token is taken")
        if "" in stop.value:
            raise UserError("--stop is empty; leave it out to continue without a stop string")
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens.value or (CHAT_MAX_NEW_TOKENS if chat.value else MAX_NEW_TOKENS),
            "temperature": temperature.value,
            "top_p": top_p.value,
            "seed": seed.value,
            "stops": [text.replace("\\n", "\n") for text in stop.value],
        }
        model = Pretrained.open(path.value, CHECKPOINT)
        encode = _chat_encoder(model, system.value) if chat.value else None
        if encode and not items:
            with _loaded(model, 1, dtype.value, stretch=STREAM_STRETCH, shortest=CHAT_SHORTEST) as generator:
                return chat_on_terminal(generator, encode, model.model.context_length, **options)
        prompts = _encode_all(items, encode) if encode else [item["prompt"] for item in items]
        shown = ["" if encode else item["prompt"] for item in items]
        if len(items) == 1 and output_path is None:
            with _loaded(model, 1, dtype.value, stretch=STREAM_STRETCH) as generator:
                return _print_one(generator, shown[0], prompts[0], **options)
        with _loaded(model, len(items), dtype.value) as generator:
            continuations = _continue_all(generator, prompts, **options)
        if output_path:
            lines = [
                {**item, "continuation": text, "token_ids": list(token_ids), "logprobs": list(logprobs)}
                for item, (_, text, token_ids, logprobs) in zip(items, continuations)
            ]
            write_text(output_path, json_lines(lines))
        else:
            print("\n\n".join(for_terminal(before + text) for before, (_, text, *_) in zip(shown, continuations)))

    run(command)


if __name__ == "__main__":
    main()
