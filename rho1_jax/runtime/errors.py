"""The error for anything a user can fix."""


class UserError(Exception):
    """Wrong input. The message is one line: what was wrong, where, and what to do."""
