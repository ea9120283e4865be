"""Files that are written whole or not at all, and read with errors a user can act on."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from rho1_jax.runtime.errors import UserError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write to. It takes the place of `path` when the block ends without an error."""
    beside = path.with_name(f"{path.name}.tmp")
    yield beside
    beside.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole UTF-8 text file, or leaves what was there."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def json_lines(records: Iterable[Any]) -> str:
    """Records as JSON lines. What is read back is to be split at "\\n" alone: a record may hold other line ends."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file. Raises UserError where it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def sha256(path: pathlib.Path) -> str:
    """The checksum of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
