"""What ends a program with one line instead of a traceback."""


class UserError(Exception):
    """Bad input: exit code 2."""


class RunError(Exception):
    """A run that cannot go on (a loss that is not finite, say): exit code 1."""
