"""Follow the characters of a user's data through a chat template.

Data can hold the name of a special token, which must stay text, so the characters that a template writes must be told
from those of the data. Before rendering, the characters of the data move to planes of Unicode that are unassigned, one
plane for each owner. A template copies, joins, trims and cuts them like any others. Afterwards they move back.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from rho1_jax.data.records import BadRecord, check_text

TEMPLATE = 0  # owner of the characters that the template writes
OWNERS = range(1, 11)  # possible owners of data
FIRST_PLANE = 4  # of the unassigned planes 4 to 13
# Noncharacters of Unicode, which no text may hold.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"
_RESERVED = re.compile("[\ufdd0-\ufdef\U00040000-\U000dffff]")
_FIXED_KEYS = ("role", "type")  # a template compares their values, and nobody writes text there

# Characters that stay: whitespace, which templates trim, and those that JSON escapes.
_STAY = np.array([chr(code).isspace() or code < 32 or chr(code) in '"\\' for code in range(1 << 16)])


def mark(text: str, owner: int, special: Collection[str], literals: Collection[str] = ()) -> str:
    """The text with its characters moved to the owner's plane, except whitespace and what JSON escapes.

    Args:
      text: a string of the data.
      owner: one of OWNERS.
      special: names of special tokens, of which every character moves.
      literals: strings that the template looks for, which stay.

    Raises:
      BadRecord: it is not text, or holds a character that is reserved here.
    """
    check_text(text)
    if reserved := _RESERVED.search(text):
        raise BadRecord(f"the character U+{ord(reserved[0]):04X} is not assigned in Unicode; remove it")
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4").copy()
    moves = (codes < 1 << 16) & ~_STAY[codes & 0xFFFF]
    if literals:
        names = sorted({*special, *literals}, key=len, reverse=True)
        for found in re.finditer("|".join(map(re.escape, names)), text):
            if found[0] not in special:
                moves[found.start() : found.end()] = False
    codes[moves] += (FIRST_PLANE - OWNERS[0] + owner) << 16
    return codes.tobytes().decode("utf-32-le")


def mark_all(value: Any, mark_text: Callable[[str], str], special: Collection[str]) -> Any:
    """A JSON value with every string in it marked, except keys, and roles and types.

    Raises:
      BadRecord: one of the latter holds the name of a special token.
    """
    if isinstance(value, str):
        return mark_text(value)
    if isinstance(value, list):
        return [mark_all(item, mark_text, special) for item in value]
    if not isinstance(value, dict):
        return value
    marked = {}
    for key, item in value.items():
        fixed = key in _FIXED_KEYS and isinstance(item, str)
        for text in (key, item) if fixed else (key,):
            if _RESERVED.search(text) or any(name in text for name in special):
                raise BadRecord(f"{text[:50]!r} must not hold the name of a special token")
        marked[key] = item if fixed else mark_all(item, mark_text, special)
    return marked


def unmark(text: str) -> tuple[str, np.ndarray]:
    """The text with marked characters moved back, and the owner of each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    planes = (codes >> 16).astype(np.int8)
    owners = np.where((planes >= FIRST_PLANE) & (planes < FIRST_PLANE + len(OWNERS)), planes - FIRST_PLANE + 1, 0)
    original = np.where(owners > 0, codes & 0xFFFF, codes).astype("<u4")
    return original.tobytes().decode("utf-32-le"), owners
