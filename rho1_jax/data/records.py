"""Text files in: JSON lines (plain, .gz, .zst), Parquet and plain text, one document a record."""

import glob
import io
import json
import pathlib
import string
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".tex": "text"}


class BadRecord(ValueError):
    """A record that holds no document; the message says why."""


def expand(patterns: Sequence[str]) -> list[pathlib.Path]:
    """The files that paths and glob patterns name, sorted within each pattern.

    Raises:
      UserError: a pattern matches nothing, or a file is of an unknown format.
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
    """ "json", "parquet" or "text", by the file's name."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: unknown kind of file; known are {known}, each but Parquet also with .gz or .zst")
    return FORMATS[suffixes[-1]]


def read(path: pathlib.Path) -> Iterator[tuple[int, Any, int]]:
    """Raw records of a file.

    Yields:
      Line or row number from 1; the bytes of a JSON line or of a whole text, or a Parquet row; how many bytes of the
      file have been read.

    Raises:
      UserError: the file cannot be read as what its name says.
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
            # Unlike other readers, pyarrow's tells a file that was cut short.
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
    """One raw record: an object with keys or, of a plain text file, its text.

    Args:
      path: the file it came from.
      record: as `read` yields it.

    Raises:
      BadRecord: the record is not UTF-8, not JSON, or no object.
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
      record: as `parse` gives it.
      templates: format strings over a record's keys, such as "{text}"; the first one whose keys the record has makes
        the text. Plain text ignores them.

    Raises:
      BadRecord: the record lacks the keys of every template, or holds no text there.
    """
    if isinstance(record, str):
        return record
    for template in templates:
        keys = template_keys(template)
        if record.keys() >= set(keys):
            break
    else:
        wanted = " nor ".join(", ".join(map(repr, template_keys(template))) for template in templates)
        raise BadRecord(f"lacks the key {wanted}; it has {', '.join(map(repr, record)) or 'none'}")
    for key in keys:
        if not isinstance(record[key], str):
            raise BadRecord(f"the key {key!r} holds {type(record[key]).__name__}, not text")
    text = template.format_map(record)
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Raises BadRecord where a text has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"not text: a lone surrogate at character {error.start}") from None


def parse_templates(text_key: str, text_templates: Sequence[str]) -> tuple[str, ...]:
    """The templates that the two flags ask for; a backslash and n in one stand for a line break.

    Raises:
      UserError: one takes no keys from a record.
    """
    templates = tuple(text.replace("\\n", "\n") for text in text_templates) or ("{" + text_key + "}",)
    for template in templates:
        template_keys(template)
    return templates


def template_keys(template: str) -> list[str]:
    """The keys that a template takes from a record.

    Raises:
      UserError: it is no format string over plain keys, or takes none.
    """
    try:
        keys = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if not keys or not all(key.isidentifier() for key in keys):
            raise ValueError("it must hold plain keys in braces, like '{question}\\n{answer}'")
    except ValueError as error:
        raise UserError(f"--text_template {template!r}: {error}") from None
    return keys
