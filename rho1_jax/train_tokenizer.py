"""Trains a SentencePiece tokenizer with byte fallback on text files.

rho1 tokenizer --input=FILES --output=FILE.model --vocab_size=8192 [--text_key=text]
"""

import io
import pathlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from absl import flags

from rho1_jax.data import records
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, replacing

# Longer lines are split: SentencePiece would drop them.
MAX_SENTENCE_BYTES = 4192


def sentences(files: Sequence[pathlib.Path], templates: Sequence[str]) -> Iterator[str]:
    """Yields the lines of all documents. Raises UserError, with file and line, at a bad record."""
    for path in files:
        for line, record, _ in records.read(path):
            try:
                text = records.document(records.parse(path, record), templates)
            except records.BadRecord as error:
                raise UserError(f"{path}:{line}: {error}") from None
            for sentence in filter(None, text.split("\n")):
                for start in range(0, len(sentence), MAX_SENTENCE_BYTES // 4):
                    yield sentence[start : start + MAX_SENTENCE_BYTES // 4]


def sample(lines: Iterable[str], limit: int) -> list[str]:
    """Samples `limit` lines uniformly, the same ones on every machine.

    SentencePiece can sample lines itself, but seeds its generator differently in every process.
    """
    generator, kept = random.Random(0), []
    for number, line in enumerate(lines):
        if number < limit:
            kept.append(line)
        elif (place := int(generator.random() * (number + 1))) < limit:
            kept[place] = line
    return kept


def train_tokenizer(
    files: Sequence[pathlib.Path], output: pathlib.Path, vocab_size: int, templates: Sequence[str], max_sentences: int
) -> None:
    """Writes a byte-pair model. It is lossless, and each digit and each line break is a token.

    The same text gives the same model, to the byte.

    Args:
      files: the text to learn from.
      output: the model file.
      vocab_size: pieces, including 256 bytes.
      templates: format strings over a record's keys, see `records.document`.
      max_sentences: maximum number of lines to learn from, kept in memory. A longer text is sampled.

    Raises:
      UserError: a record is bad, or the text is too short for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample(sentences(files, templates), max_sentences)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            shuffle_input_sentence=False,
            max_sentence_length=MAX_SENTENCE_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--vocab_size={vocab_size} does not fit this text: {reason}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        temporary.write_bytes(model.getvalue())


def main() -> None:
    """The command: parses the flags and calls `train_tokenizer`."""
    inputs, text_key, text_templates = records.define_document_flags()
    output = flags.DEFINE_string("output", None, "Model file to write.", required=True)
    vocab_size = flags.DEFINE_integer("vocab_size", 8192, "Pieces, including 256 bytes.")
    max_sentences = flags.DEFINE_integer("max_sentences", 1_000_000, "Lines to learn from, sampled from more.", 1)

    def command() -> None:
        files, path = records.expand(inputs.value), local_path(output.value, "--output")
        templates = records.parse_templates(text_key.value, text_templates.value)
        print(f"training on {len(files)} files; SentencePiece shows no progress", file=sys.stderr, flush=True)
        train_tokenizer(files, path, vocab_size.value, templates, max_sentences.value)
        print(f"wrote {path}")

    run(command)


if __name__ == "__main__":
    main()
