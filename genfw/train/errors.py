"""What went wrong, said to the person who can put it right: a message, no traceback."""

import math
import shlex
from collections.abc import Mapping
from typing import Any


class GenfwError(Exception):
    """Something the person can put right; shown as it stands, exit code 1.

    The message says what was expected, what came, and what to do.
    """

    exit_code = 1
    on_all_ranks = False
    """Whether every rank raises it at the same place: then none is left waiting for another."""


class ConfigError(GenfwError):
    """The configuration is wrong; found before anything is trained, exit code 2."""

    exit_code = 2


class Stopped(GenfwError):
    """All ranks agreed to stop."""

    on_all_ranks = True

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def not_finite(results: Mapping[str, Any]) -> str | None:
    """What is wrong with the NLL of a test; None if it is finite, or there is none.

    Example:
        >>> not_finite({"test/nll": None, "test/nonfinite": 3.0, "test/count": 447.0})
        'the NLL of 3 of 447 test images is not finite'
        >>> not_finite({"test/nll": None, "test/accuracy": 0.1})  # of labels: nobody counts
        'the test NLL is not finite'
    """
    nll = results.get("test/nll", 0.0)
    if nll is not None and math.isfinite(nll):
        return None
    if "test/nonfinite" not in results:
        return "the test NLL is not finite"
    bad, count = (results.get(f"test/{key}") or math.nan for key in ("nonfinite", "count"))
    return f"the NLL of {bad:.0f} of {count:.0f} test images is not finite"


def one_line(error: BaseException) -> str:
    """An exception as a line of text."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def command_line(*words: str) -> str:
    """`python -m` and these words, to be copied into a shell.

    Example:
        >>> command_line("genfw", "resume=outputs/a b")
        "python -m genfw 'resume=outputs/a b'"
    """
    return shlex.join(("python", "-m", *words))


def resume_line(folder: object) -> str:
    """What goes on with a run, to be copied into a shell."""
    return command_line("genfw", f"resume={folder}")
