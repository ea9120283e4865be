"""Follow the characters of a user's data through a chat template.

Data can contain the name of a special token, which must stay text. So the characters that a template writes have to be
distinguished from those of the data. Before rendering, the characters of the data move to unassigned planes of Unicode,
one plane for each owner. A template copies, joins, trims and cuts them like any others. Afterwards they move back.
"""

import functools
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from rho1_jax.data.records import BadRecord, check_text

TEMPLATE = 0  # owner of the characters that the template writes
OWNERS = range(1, 11)  # possible owners of data
FIRST_PLANE = 4  # of the unassigned planes 4 to 13
# Noncharacters of Unicode, which no text may hold.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"
CALL_MARK = "\ufdd4"
_RESERVED = re.compile("[\ufdd0-\ufdef\U00040000-\U000dffff]")
_FIXED_KEYS = ("role", "type")  # templates compare their values, which are not free text

# Characters that stay: whitespace, which templates trim, those that JSON escapes, and the private ones that make room
# for emoji. Beyond the first plane, only emoji move: a whole message may consist of them.
EMOJI, EMOJI_ROOM = 0x1F000, 0xE000  # the first of 4096 characters each
_STAY = np.array(
    [
        chr(code).isspace() or code < 32 or chr(code) in '"\\' or code >> 12 == EMOJI_ROOM >> 12
        for code in range(1 << 16)
    ]
)


class Marker:
    """Marks the data of conversations, given the names of special tokens.

    Attributes:
      special: matches the name of a special token; the longest wins.
    """

    def __init__(self, names: Collection[str]):
        self.special = _any_of(names)
        # Names whose characters all stay would be taken for the template's.
        self._untrackable = _any_of([name for name in names if not _moving(_codes(name)).any()])

    def mark(self, text: str, owner: int, literals: Collection[str] = ()) -> str:
        """The text with its characters moved to the owner's plane, except whitespace and what JSON escapes.

        Args:
          text: a string of the data.
          owner: one of OWNERS.
          literals: strings that the template looks for. They stay, except inside a special token's name.

        Raises:
          BadRecord: it is not valid text, or holds a character that is reserved here.
        """
        check_text(text)
        self._check(text, self._untrackable)
        codes = _codes(text).copy()
        moves = _moving(codes)
        stays = np.zeros(len(text), bool)
        for pattern, is_kept in ((_any_of(literals), True), (self.special, False)):
            for match in pattern.finditer(text):
                stays[match.start() : match.end()] = is_kept
        moves &= ~stays
        codes[moves & (codes >> 12 == EMOJI >> 12)] -= EMOJI - EMOJI_ROOM
        codes[moves] += (FIRST_PLANE - OWNERS[0] + owner) << 16
        return codes.tobytes().decode("utf-32-le")

    def mark_all(self, value: Any, owner: int, literals: Collection[str] = ()) -> Any:
        """A JSON value with every string in it marked, except keys, roles and types.

        Raises:
          BadRecord: a key, role or type holds the name of a special token; or as for `mark`.
        """
        if isinstance(value, str):
            return self.mark(value, owner, literals)
        if isinstance(value, list):
            return [self.mark_all(item, owner, literals) for item in value]
        if not isinstance(value, dict):
            return value
        marked = {}
        for key, item in value.items():
            fixed = key in _FIXED_KEYS and isinstance(item, str)
            for text in (key, item) if fixed else (key,):
                self._check(text, self.special)
            marked[key] = item if fixed else self.mark_all(item, owner, literals)
        return marked

    def _check(self, text: str, special: re.Pattern[str]) -> None:
        if reserved := _RESERVED.search(text):
            raise BadRecord(f"the character U+{ord(reserved[0]):04X} is not assigned in Unicode; remove it")
        if name := special.search(text):
            raise BadRecord(f"{text[:50]!r} holds the name of a special token, {name[0]!r}, where it cannot be tracked")


@functools.lru_cache
def marker(names: tuple[str, ...]) -> Marker:
    """The marker for the names of special tokens."""
    return Marker(names)


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _moving(codes: np.ndarray) -> np.ndarray:
    """For each character, True if marking moves it."""
    return (codes >> 12 == EMOJI >> 12) | (codes < 1 << 16) & ~_STAY[codes & 0xFFFF]


def unmark(text: str) -> tuple[str, np.ndarray]:
    """The text with marked characters moved back, and the owner of each character."""
    codes = _codes(text)
    planes = (codes >> 16).astype(np.int8)
    owners = np.where((planes >= FIRST_PLANE) & (planes < FIRST_PLANE + len(OWNERS)), planes - FIRST_PLANE + 1, 0)
    original = np.where(owners > 0, codes & 0xFFFF, codes).astype("<u4")
    original[(owners > 0) & (original >> 12 == EMOJI_ROOM >> 12)] += EMOJI - EMOJI_ROOM
    return original.tobytes().decode("utf-32-le"), owners
