"""Files that are there whole or not at all."""

import contextlib
import pathlib
from collections.abc import Iterator


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
