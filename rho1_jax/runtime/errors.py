"""The error for anything a user can fix, and how text from outside is shown in one."""


def printable(text: str) -> str:
    """The text with escapes, such as \\x1b, for everything that a terminal might obey instead of showing it."""
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)


class UserError(Exception):
    """Wrong input. The message is one line: what was wrong, where, and what to do."""
