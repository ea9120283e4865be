"""Read records from JSON lines, JSON arrays, Parquet and plain text files. Each record holds one document."""

import collections
import glob
import io
import itertools
import json
import pathlib
import string
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from absl import flags

from rho1_jax.data import json_array
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, split_list

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# Longest record of each format. Parsed JSON takes up to 25 times its size in memory.
MAX_BYTES = {"json": 16 << 20, "text": 64 << 20, "parquet": 64 << 20}
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".tex": "text"}


class BadRecord(ValueError):
    """A record without a usable document. The message says why."""


def expand(patterns: Sequence[str]) -> list[pathlib.Path]:
    """The files that match paths and glob patterns, sorted within each pattern. A path that exists is not a pattern.

    Raises:
      UserError: a pattern matches no file, or a file has an unknown type.
    """
    files: dict[pathlib.Path, None] = {}
    for pattern in patterns:
        path = local_path(pattern, "--input")
        matches = [path] if path.is_file() else sorted(map(pathlib.Path, glob.glob(pattern, recursive=True)))
        matches = [path for path in matches if path.is_file()]
        if not matches:
            raise UserError(f"{pattern}: no such file")
        files |= dict.fromkeys(matches)
    for path in files:
        file_format(path)
    return list(files)


def file_format(path: pathlib.Path) -> str:
    """The file's format, from its name: "json", "parquet" or "text". Raises UserError if it is unknown."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: unknown file type; use one of {known} (all but .parquet also with .gz or .zst)")
    return FORMATS[suffixes[-1]]


def read(path: pathlib.Path) -> Iterator[tuple[int, Any, int]]:
    """Reads the raw records of a file. MAX_BYTES bounds the memory, also for compressed files.

    Yields:
      (number, record, position). `number` counts lines, rows, or items of a JSON array from 1. `record` is for `parse`:
      a line, an item or a whole text file, as bytes, a Parquet row, as a dict, or a BadRecord. `position` is the number
      of bytes read so far.

    Raises:
      UserError: the file cannot be read in the format that its name implies.
    """
    kind = file_format(path)
    try:
        if kind == "parquet":
            table = pyarrow.parquet.ParquetFile(path)
            rows, size = table.metadata.num_rows, path.stat().st_size
            records = (record for batch in table.iter_batches(batch_size=256) for record in _parquet_rows(batch))
            for row, record in enumerate(records, start=1):
                yield row, record, size * row // rows
            return
        with path.open("rb") as file:
            codec = COMPRESSED.get(path.suffix)
            # Unlike other readers, pyarrow reports a truncated file.
            stream = io.BufferedReader(pyarrow.CompressedInputStream(file, codec)) if codec else file
            if kind == "text":
                text = stream.read(MAX_BYTES[kind] + 1)
                yield 1, text if len(text) <= MAX_BYTES[kind] else _too_long(kind), file.tell()
                return
            for number, line in enumerate(_json_texts(path, stream), start=1):
                if isinstance(line, BadRecord) or line.strip():
                    yield number, line, file.tell()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _json_texts(path: pathlib.Path, stream: BinaryIO) -> Iterator[bytes | BadRecord]:
    """The items of a JSON array in a .json file, or else lines."""
    if ".json" in path.suffixes and json_array.is_array(stream):
        limit = MAX_BYTES["json"]
        return (_too_long("json") if item is None else item for item in json_array.split(stream, limit))
    return _lines(stream)


def _lines(stream: BinaryIO) -> Iterator[bytes | BadRecord]:
    """The lines of a stream. A line that is too long is skipped piece by piece and becomes a BadRecord."""
    limit = MAX_BYTES["json"]
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(limit)
        yield _too_long("json")


def _parquet_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | BadRecord]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # a row has no value in Python, such as text that is not UTF-8
        rows = [_parquet_row(batch.slice(row, 1)) for row in range(len(batch))]
    for row in rows:
        yield row if size(row) <= MAX_BYTES["parquet"] else _too_long("parquet")


def _parquet_row(row: pyarrow.RecordBatch) -> dict[str, Any] | BadRecord:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start}")
    except (ValueError, OverflowError) as error:
        return BadRecord(f"cannot be read: {' '.join(str(error).split())}")


def _too_long(kind: str) -> BadRecord:
    return BadRecord(f"longer than {MAX_BYTES[kind] >> 20} MiB; split it into several records")


def size(record: Any) -> int:
    """The size of a record that `read` yielded: bytes, or characters in Parquet."""
    if isinstance(record, dict):
        return sum(len(str(value)) for value in record.values())
    return len(record) if isinstance(record, bytes) else 0


def parse(path: pathlib.Path, record: Any) -> dict[str, Any] | str:
    """Parses a raw record: into a dict, or into a str if it comes from a plain text file.

    Args:
      path: the file that the record comes from.
      record: a record that `read` yielded.

    Raises:
      BadRecord: the record is too long, not UTF-8, not JSON, not a JSON object, or has a key twice.
    """
    if isinstance(record, BadRecord):
        raise record
    if isinstance(record, bytes):
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 at byte {error.start}") from None
        if file_format(path) == "text":
            return text
        try:
            record = json.loads(text, object_pairs_hook=_object)
        except BadRecord:
            raise
        except RecursionError:
            raise BadRecord("not JSON: nested too deeply") from None
        except ValueError as error:  # not only JSONDecodeError: Python limits the digits of an integer
            raise BadRecord(f"not JSON: {str(error).partition(';')[0]}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__}, not an object with keys")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadRecord(f"the key {twice[:50]!r} appears twice")
    return parsed


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
    present = ", ".join(repr(key[:50]) for key in itertools.islice(record, 20)) or "none"
    return BadRecord(f"missing keys: needs {needed}; has {present}")


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
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
        keys = [name for _, name, _, _ in fields if name is not None]
        if not keys or not all(key.isidentifier() for key in keys):
            raise ValueError("put plain keys in braces, like '{question}\\n{answer}'")
        if any(spec or conversion for _, _, spec, conversion in fields):
            raise ValueError("a key takes no ':' or '!' format")
    except ValueError as error:
        raise UserError(f"text template {template!r}: {error}") from None
    return keys


class _PathListParser(flags.ArgumentParser):
    """Parses a list of paths with `split_list`."""

    def parse(self, argument: str) -> list[str]:
        return [part for part in split_list(argument) if part]


def define_document_flags() -> tuple[Any, Any, Any]:
    """Defines --input, --text_key and --text_template, and returns their holders."""
    return (
        flags.DEFINE(
            _PathListParser(),
            "input",
            None,
            r"Files or glob patterns, separated by commas. Write \, for a comma in a name.",
            required=True,
        ),
        flags.DEFINE_string("text_key", "text", "Key of a record that holds its text."),
        flags.DEFINE_multi_string(
            "text_template",
            [],
            r"Format string over a record's keys, instead of --text_key: '{question}\n{answer}'. May be given several "
            "times: the first one whose keys the record has is used.",
        ),
    )
