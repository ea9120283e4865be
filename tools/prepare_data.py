"""Turns text files into packed rows for training.

python -m tools.prepare_data --input=FILES --tokenizer=FILE.model --output=DIR --seq_len=2048 [--eval_fraction=0.01]

Reads JSON lines (plain, .gz, .zst), Parquet and plain text. Interrupted and started again, it goes on.
"""

import os
import pathlib

from absl import flags

from rho1_jax.config import run
from rho1_jax.data import records
from rho1_jax.data.prepare import Options, prepare
from rho1_jax.data.tokenizer import Tokenizer


def main() -> None:
    """The command: its flags, then `prepare`."""
    inputs = flags.DEFINE_list("input", None, "Files or globs, divided by commas.", required=True)
    tokenizer = flags.DEFINE_string("tokenizer", None, "A SentencePiece model.", required=True)
    output = flags.DEFINE_string("output", None, "Directory of the data set to write.", required=True)
    seq_len = flags.DEFINE_integer("seq_len", 2048, "Targets in a row.")
    text_key = flags.DEFINE_string("text_key", "text", "The key of a record that holds its text.")
    text_templates = flags.DEFINE_multi_string(
        "text_template",
        [],
        r"Format string over a record's keys, instead: '{question}\n{answer}'. Of several the first that fits is used.",
    )
    eval_fraction = flags.DEFINE_float("eval_fraction", 0.0, "Share of the documents to hold out for evaluation.")
    max_bad_fraction = flags.DEFINE_float("max_bad_fraction", 0.0, "Share of bad records to put up with.")
    workers = flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "Processes that tokenize.", lower_bound=1)

    def command() -> None:
        options = Options(
            templates=records.parse_templates(text_key.value, text_templates.value),
            seq_len=seq_len.value,
            eval_fraction=eval_fraction.value,
            max_bad_fraction=max_bad_fraction.value,
        )
        files = records.expand(inputs.value)
        manifest = prepare(files, Tokenizer(tokenizer.value), pathlib.Path(output.value), options, workers.value)
        counts = ", ".join(f"{manifest[name]:,} {name}" for name in ("documents", "tokens", "rows", "bad_records"))
        print(f"{output.value}: {counts}".replace("_", " "))

    run(command)


if __name__ == "__main__":
    main()
