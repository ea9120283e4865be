"""Local files: written whole or not at all, and read with errors a user can act on."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rho1_jax.runtime.errors import UserError

# The start of gs://bucket/run. One slash is enough: that is all `pathlib.Path` leaves of the two.
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/")


def local_path(text: str | pathlib.Path, name: str) -> pathlib.Path:
    """A path the user gave. `name` is the flag or config key it came from, for the error.

    Raises:
      UserError: the path has a scheme, such as gs:// or s3://.
    """
    if _SCHEME.match(str(text)):
        raise UserError(
            f"{name}={text}: rho1 reads and writes local files only; mount the bucket, for example with gcsfuse"
        )
    return pathlib.Path(text)


def split_list(text: str, separator: str = ",") -> list[str]:
    """Splits a list that the user gave.

    A path that exists is a single part, even if the separator is in its name. Otherwise, a backslash before a separator
    makes it part of a name.
    """
    if os.path.exists(text):
        return [text]
    parts = re.split(rf"(?<!\\){re.escape(separator)}", text)
    return [part.replace(f"\\{separator}", separator) for part in parts]


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path to write to. It replaces `path` when the block ends without an error."""
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    temporary.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a UTF-8 text file, and its folder if needed. On failure the previous file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_lines(records: Iterable[Any]) -> str:
    """Records as JSON lines. Split them at "\\n" only: a record may contain other line separators."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """SHA-256, in hex, of what JSON can hold. The order of the keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
