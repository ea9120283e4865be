"""Turns text files into packed rows for training.

python -m tools.prepare_data --input=FILES --tokenizer=FILE.model --output=DIR --seq_len=2048 [--eval_fraction=0.01]

Reads JSON lines (plain, .gz, .zst), Parquet and plain text. Interrupted and started again, it goes on.
"""

import os
import pathlib

from absl import flags

from rho1_jax.data import records
from rho1_jax.data.preparation import Options, prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.data.transcripts import Transcripts, parse_role_templates
from rho1_jax.runtime.command_line import run


def main() -> None:
    """The command: its flags, then `prepare`."""
    inputs = flags.DEFINE_list("input", None, "Files or globs, divided by commas.", required=True)
    tokenizer = flags.DEFINE_string(
        "tokenizer", None, "A SentencePiece model, a tokenizer.json, or a folder with one.", required=True
    )
    output = flags.DEFINE_string("output", None, "Directory of the data set to write.", required=True)
    seq_len = flags.DEFINE_integer("seq_len", 2048, "Targets in a row.")
    text_key = flags.DEFINE_string("text_key", "text", "The key of a record that holds its text.")
    text_templates = flags.DEFINE_multi_string(
        "text_template",
        [],
        r"Format string over a record's keys, instead: '{question}\n{answer}'. Of several the first that fits is used.",
    )
    is_transcripts = flags.DEFINE_bool(
        "transcripts", False, "Records are conversations, to be trained on in their responses alone; rows cut none."
    )
    prompt_key = flags.DEFINE_string("prompt_key", "prompt", "Conversations: the key of a prompt.")
    response_key = flags.DEFINE_string("response_key", "response", "Conversations: the key of its response.")
    messages_key = flags.DEFINE_string("messages_key", "messages", "Conversations: or the key of a list of messages.")
    role_templates = flags.DEFINE_multi_string(
        "role_template", [], r"Conversations: how a role is written down: 'user=Q: {content}\nA: '."
    )
    eval_fraction = flags.DEFINE_float("eval_fraction", 0.0, "Share of the documents to hold out for evaluation.")
    max_bad_fraction = flags.DEFINE_float("max_bad_fraction", 0.0, "Share of bad records to put up with.")
    workers = flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "Processes that tokenize.", lower_bound=1)

    def command() -> None:
        options = Options(
            templates=records.parse_templates(text_key.value, text_templates.value),
            transcripts=Transcripts(
                parse_role_templates(role_templates.value), prompt_key.value, response_key.value, messages_key.value
            )
            if is_transcripts.value
            else None,
            seq_len=seq_len.value,
            eval_fraction=eval_fraction.value,
            max_bad_fraction=max_bad_fraction.value,
        )
        files = records.expand(inputs.value)
        manifest = prepare(files, Tokenizer(tokenizer.value), pathlib.Path(output.value), options, workers.value)
        names = ("documents", "tokens", "rows", "bad_records", "truncated")
        counts = ", ".join(f"{manifest[name]:,} {name}" for name in names)
        print(f"{output.value}: {counts}".replace("_", " "))

    run(command)


if __name__ == "__main__":
    main()
