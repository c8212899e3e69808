"""Errors that a user can mend: shown in one line, never as a traceback."""


class UsageError(Exception):
    """Something that the user asked for cannot be done; the message names the option and the remedy."""


class NonFiniteError(Exception):
    """The loss is not finite any more; the message names the step."""
