"""The error that is the user's to mend."""


class UserError(Exception):
    """Wrong input. The message says what was wrong, where, and what to do, in one line."""
