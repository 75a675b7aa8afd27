"""What went wrong, said to the person who can put it right: a message, no traceback."""


class GenfwError(Exception):
    """Something the person can put right; shown as it stands, exit code 1.

    The message says what was expected, what came, and what to do.
    """

    exit_code = 1


class ConfigError(GenfwError):
    """The configuration is wrong; found before anything is trained, exit code 2."""

    exit_code = 2
