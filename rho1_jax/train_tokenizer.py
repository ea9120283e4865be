"""Trains a SentencePiece tokenizer with byte fallback on text files.

python -m tools.train_tokenizer --input=FILES --output=FILE.model --vocab_size=8192 [--text_key=text]
"""

import io
import pathlib
import sys
from collections.abc import Iterator, Sequence

import sentencepiece
from absl import flags

from rho1_jax.data import records
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import replacing

# Longer lines than this are cut: SentencePiece drops them otherwise.
MAX_SENTENCE_BYTES = 4192


def sentences(files: Sequence[pathlib.Path], templates: Sequence[str]) -> Iterator[str]:
    """The lines of all documents. Raises UserError, with file and line, at a bad record."""
    for path in files:
        for line, record, _ in records.read(path):
            try:
                text = records.document(records.parse(path, record), templates)
            except records.BadRecord as error:
                raise UserError(f"{path}:{line}: {error}") from None
            for sentence in filter(None, text.split("\n")):
                for start in range(0, len(sentence), MAX_SENTENCE_BYTES // 4):
                    yield sentence[start : start + MAX_SENTENCE_BYTES // 4]


def train_tokenizer(
    files: Sequence[pathlib.Path], output: pathlib.Path, vocab_size: int, templates: Sequence[str], max_sentences: int
) -> None:
    """Writes a byte-pair model: lossless, digits one by one, line breaks tokens of their own.

    Raises:
      UserError: a record is bad, or the text does not fill the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(files, templates),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--vocab_size={vocab_size} does not suit this text: {reason}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as beside:
        beside.write_bytes(model.getvalue())


def main() -> None:
    """The command: its flags, then `train_tokenizer`."""
    inputs = flags.DEFINE_list("input", None, "Files or globs, divided by commas.", required=True)
    output = flags.DEFINE_string("output", None, "The model file to write.", required=True)
    vocab_size = flags.DEFINE_integer("vocab_size", 8192, "Number of pieces, 256 bytes among them.")
    text_key = flags.DEFINE_string("text_key", "text", "The key of a record that holds its text.")
    text_templates = flags.DEFINE_multi_string(
        "text_template",
        [],
        r"Format string over a record's keys, instead: '{question}\n{answer}'. Of several the first that fits is used.",
    )
    max_sentences = flags.DEFINE_integer("max_sentences", 1_000_000, "Lines to learn from, drawn from all.")

    def command() -> None:
        files = records.expand(inputs.value)
        templates = records.parse_templates(text_key.value, text_templates.value)
        print(f"training on {len(files)} files; SentencePiece shows no progress", file=sys.stderr, flush=True)
        train_tokenizer(files, pathlib.Path(output.value), vocab_size.value, templates, max_sentences.value)
        print(f"wrote {output.value}")

    run(command)


if __name__ == "__main__":
    main()
