"""Split a file that holds one JSON array into its items, without reading all of it into memory."""

import re
from collections.abc import Iterator
from typing import BinaryIO

CHUNK_BYTES = 1 << 16
_STRUCTURE = re.compile(rb'["{}\[\],]')
_IN_STRING = re.compile(rb'["\\]')
_SPACE = b" \t\r\n"


def is_array(stream: BinaryIO) -> bool:
    """True if the text of a buffered stream begins with a bracket. Consumes nothing."""
    return stream.peek(CHUNK_BYTES).lstrip(_SPACE)[:1] == b"["  # type: ignore[attr-defined]


def split(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Yields the JSON text of each item of an array, unparsed, or None for an item longer than `limit` bytes.

    Raises:
      ValueError: the brackets do not match, an item is empty, or the file ends early. The message says where.
    """
    item, is_long = bytearray(), False
    number, depth, in_string, escaped = 1, 0, False, False
    offset = 0  # of the chunk in the file
    opened = closed = False
    while chunk := stream.read(CHUNK_BYTES):
        start, position, escaped = 0, int(escaped), False
        if not opened:
            opened = b"[" in chunk
            start = position = chunk.index(b"[") + 1 if opened else len(chunk)
        while not closed and (match := (_IN_STRING if in_string else _STRUCTURE).search(chunk, position)):
            position, where = match.end(), offset + match.start()
            if match[0] == b"\\":
                escaped = position == len(chunk)
                position += 1
            elif match[0] == b'"':
                in_string = not in_string
            elif match[0] in b"{[":
                depth += 1
            elif depth and match[0] in b"}]":
                depth -= 1
            elif match[0] == b"}":
                raise ValueError(f"not a JSON array: item {number} has a closing bracket too many, at byte {where}")
            elif not depth:
                item += chunk[start : match.start()]
                closed, start = match[0] == b"]", position
                if item.strip(_SPACE):
                    yield None if is_long or len(item) > limit else bytes(item)
                elif number > 1 or not closed:
                    raise ValueError(f"not a JSON array: item {number} is empty, at byte {where}")
                item, is_long, number = bytearray(), False, number + 1
        item += chunk[start:]
        if closed and (rest := chunk[start:].lstrip(_SPACE)):
            raise ValueError(f"not a JSON array: more text follows it, at byte {offset + len(chunk) - len(rest)}")
        if len(item) > limit:
            item, is_long = bytearray(b"-"), True
        offset += len(chunk)
    if not closed:
        raise ValueError(f"not a JSON array: the file ends in item {number}, at byte {offset}")
