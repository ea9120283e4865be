"""Tokenizes text files and packs them into rows for training.

rho1 prepare --input=FILES --tokenizer=FILE.model --output=DIR --seq_len=2048 [--eval_fraction=0.01]

Reads JSON lines and arrays (plain, .gz, .zst), Parquet and plain text. Run the same command again to resume after an
interruption.
"""

import os
import pathlib

from absl import flags

from rho1_jax.data import records
from rho1_jax.data.chat_template import ChatTemplate
from rho1_jax.data.preparation import Options, prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.data.transcripts import Transcripts, parse_role_templates
from rho1_jax.runtime import stopping
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path


def open_chat_template(name: str, tokenizer: pathlib.Path) -> ChatTemplate:
    """The chat template that --chat_template names. Raises UserError if it does not exist, or is not valid."""
    if name != "model":
        return ChatTemplate.read(local_path(name, "--chat_template"))
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    template = ChatTemplate.open(folder)
    if template is None:
        raise UserError(
            f"--chat_template=model: {folder} has no chat_template.jinja, and no chat_template in "
            "tokenizer_config.json; give a Jinja file with --chat_template=FILE"
        )
    return template


def main() -> None:
    """The command: parses the flags and calls `prepare`."""
    inputs, text_key, text_templates = records.define_document_flags()
    tokenizer = flags.DEFINE_string(
        "tokenizer", None, "A SentencePiece model, a tokenizer.json, or a folder that holds one of them.", required=True
    )
    output = flags.DEFINE_string("output", None, "Folder of the data set to write.", required=True)
    seq_len = flags.DEFINE_integer("seq_len", 2048, "Targets in a row.")
    is_transcripts = flags.DEFINE_bool(
        "transcripts",
        False,
        "The records are conversations: train on their responses only, and keep each within a row.",
    )
    prompt_key = flags.DEFINE_string("prompt_key", "prompt", "Conversations: key of the prompt.")
    response_key = flags.DEFINE_string("response_key", "response", "Conversations: key of the response.")
    messages_key = flags.DEFINE_string(
        "messages_key", "messages", "Conversations: key of a list of messages, in records that have one."
    )
    role_templates = flags.DEFINE_multi_string(
        "role_template", [], r"Conversations: text format of a role's messages: 'user=Q: {content}\nA: '."
    )
    chat_template = flags.DEFINE_string(
        "chat_template",
        None,
        "Conversations: write them with a chat template: 'model' for the one beside --tokenizer, or a Jinja file.",
    )
    eval_fraction = flags.DEFINE_float("eval_fraction", 0.0, "Share of the documents to hold out for evaluation.")
    max_bad_fraction = flags.DEFINE_float("max_bad_fraction", 0.0, "Share of bad records to skip without an error.")
    workers = flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "Tokenizing processes.", lower_bound=1)

    def command() -> None:
        stopping.listen()
        files = records.expand(inputs.value)
        tokenizer_path, directory = local_path(tokenizer.value, "--tokenizer"), local_path(output.value, "--output")
        if chat_template.value and role_templates.value:
            raise UserError("give either --chat_template or --role_template")
        options = Options(
            templates=records.parse_templates(text_key.value, text_templates.value),
            transcripts=Transcripts(
                parse_role_templates(role_templates.value),
                prompt_key.value,
                response_key.value,
                messages_key.value,
                open_chat_template(chat_template.value, tokenizer_path) if chat_template.value else None,
            )
            if is_transcripts.value or chat_template.value
            else None,
            seq_len=seq_len.value,
            eval_fraction=eval_fraction.value,
            max_bad_fraction=max_bad_fraction.value,
        )
        manifest = prepare(files, Tokenizer(tokenizer_path), directory, options, workers.value)
        names = ("documents", "tokens", "rows", "bad_records", "truncated")
        counts = ", ".join(f"{manifest[name]:,} {name}" for name in names)
        print(f"{output.value}: {counts.replace('_', ' ')}")

    run(command)


if __name__ == "__main__":
    main()
