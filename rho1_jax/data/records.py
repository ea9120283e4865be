"""Read records from JSON lines, Parquet and plain text files. Each record holds one document."""

import glob
import io
import json
import pathlib
import string
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
from absl import flags

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".tex": "text"}


class BadRecord(ValueError):
    """A record without a usable document. The message says why."""


def expand(patterns: Sequence[str]) -> list[pathlib.Path]:
    """The files that match paths and glob patterns, sorted within each pattern.

    Raises:
      UserError: a pattern matches no file, or a file has an unknown type.
    """
    files: list[pathlib.Path] = []
    for pattern in patterns:
        local_path(pattern, "--input")
        matches = sorted(path for path in map(pathlib.Path, glob.glob(pattern, recursive=True)) if path.is_file())
        if not matches:
            raise UserError(f"{pattern}: no such file")
        files += [path for path in matches if path not in files]
    for path in files:
        file_format(path)
    return files


def file_format(path: pathlib.Path) -> str:
    """The file's format, from its name: "json", "parquet" or "text". Raises UserError if it is unknown."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: unknown file type; use one of {known} (all but .parquet also with .gz or .zst)")
    return FORMATS[suffixes[-1]]


def read(path: pathlib.Path) -> Iterator[tuple[int, Any, int]]:
    """Reads the raw records of a file.

    Yields:
      (number, record, position). `number` counts lines or rows from 1. `record` is a JSON line or a whole text file, as
      bytes, or a Parquet row, as a dict. `position` is the number of bytes read from the file so far.

    Raises:
      UserError: the file cannot be read in the format that its name implies.
    """
    kind = file_format(path)
    try:
        if kind == "parquet":
            table = pyarrow.parquet.ParquetFile(path)
            rows, size = table.metadata.num_rows, path.stat().st_size
            records = (record for batch in table.iter_batches(batch_size=256) for record in batch.to_pylist())
            for row, record in enumerate(records, start=1):
                yield row, record, size * row // rows
            return
        with path.open("rb") as file:
            codec = COMPRESSED.get(path.suffix)
            # Unlike other readers, pyarrow reports a truncated file.
            stream = io.BufferedReader(pyarrow.CompressedInputStream(file, codec)) if codec else file
            if kind == "text":
                yield 1, stream.read(), file.tell()
                return
            for line, record in enumerate(stream, start=1):
                if record.strip():
                    yield line, record, file.tell()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def parse(path: pathlib.Path, record: Any) -> dict[str, Any] | str:
    """Parses a raw record: into a dict, or into a str if it comes from a plain text file.

    Args:
      path: the file that the record comes from.
      record: a record that `read` yielded.

    Raises:
      BadRecord: the record is not UTF-8, not JSON, or not a JSON object.
    """
    if isinstance(record, bytes):
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 at byte {error.start}") from None
        if file_format(path) == "text":
            return text
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRecord(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__}, not an object with keys")
    return record


def document(record: dict[str, Any] | str, templates: Sequence[str]) -> str:
    """The text of one record.

    Args:
      record: a record that `parse` returned.
      templates: format strings over a record's keys, such as "{text}". The first one whose keys the record has gives
        the text. They are ignored for plain text.

    Raises:
      BadRecord: the record does not have the keys of any template, or holds something other than text under them.
    """
    if isinstance(record, str):
        return record
    for template in templates:
        keys = template_keys(template)
        if record.keys() >= set(keys):
            break
    else:
        raise missing_keys(record, [template_keys(template) for template in templates])
    for key in keys:
        if not isinstance(record[key], str):
            raise BadRecord(f"the key {key!r} holds {type(record[key]).__name__}, not text")
    text = template.format_map(record)
    check_text(text)
    return text


def missing_keys(record: dict[str, Any], choices: Sequence[Sequence[str]]) -> BadRecord:
    """The error for a record that does not have the keys of any choice."""
    needed = ", or ".join(" and ".join(map(repr, keys)) for keys in choices)
    return BadRecord(f"missing keys: needs {needed}; has {', '.join(map(repr, record)) or 'none'}")


def check_text(text: str) -> None:
    """Raises BadRecord if a text cannot be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"not text: a lone surrogate at character {error.start}") from None


def parse_templates(text_key: str, text_templates: Sequence[str]) -> tuple[str, ...]:
    """The templates that --text_key and --text_template specify. A backslash and an n stand for a line break.

    Raises:
      UserError: a template is not valid (see `template_keys`).
    """
    templates = tuple(text.replace("\\n", "\n") for text in text_templates) or ("{" + text_key + "}",)
    for template in templates:
        template_keys(template)
    return templates


def template_keys(template: str) -> list[str]:
    """The keys that a template uses.

    Raises:
      UserError: the template is not a format string over plain keys, or uses none.
    """
    try:
        keys = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if not keys or not all(key.isidentifier() for key in keys):
            raise ValueError("put plain keys in braces, like '{question}\\n{answer}'")
    except ValueError as error:
        raise UserError(f"text template {template!r}: {error}") from None
    return keys


def define_document_flags() -> tuple[Any, Any, Any]:
    """Defines --input, --text_key and --text_template, and returns their holders."""
    return (
        flags.DEFINE_list("input", None, "Files or glob patterns, comma-separated.", required=True),
        flags.DEFINE_string("text_key", "text", "Key of a record that holds its text."),
        flags.DEFINE_multi_string(
            "text_template",
            [],
            r"Format string over a record's keys, instead of --text_key: '{question}\n{answer}'. May be given several "
            "times: the first one whose keys the record has is used.",
        ),
    )
