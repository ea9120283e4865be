"""JSON from outside, checked against a type. A file that does not fit gives one line that names the key."""

import functools
import pathlib
from typing import Any, TypeVar

import pydantic

from rho1_jax.runtime.errors import UserError

T = TypeVar("T")
SHOWN = 60  # characters of a wrong value


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def parse_json(text: str | bytes, kind: type[T], where: object) -> T:
    """JSON text as an instance of a type: a dataclass, a pydantic model, dict[str, int] and so on.

    Types are strict: "3" is not an integer. Use pydantic.FiniteFloat for numbers, since JSON here may contain NaN.

    Args:
      text: the JSON.
      kind: the type.
      where: its file, or file and line, for errors.

    Raises:
      UserError: it is not JSON, or not of that type.
    """
    try:
        return _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key, message = ".".join(map(str, problem["loc"])), problem["msg"]
    if problem["type"] == "json_invalid":
        raise UserError(f"{where}: not JSON: {message.removeprefix('Invalid JSON: ')}")
    value = "" if problem["type"] == "missing" else f", not {_short(problem['input'])}"
    raise UserError(f"{where}: {key + ': ' if key else ''}{message[:1].lower()}{message[1:]}{value}")


def read_json(path: pathlib.Path, kind: type[T]) -> T:
    """The content of a JSON file as an instance of a type.

    Raises:
      UserError: the file is missing or unreadable, is not JSON, or not of that type.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    return parse_json(content, kind, path)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
