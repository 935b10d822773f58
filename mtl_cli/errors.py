"""Errors a user can provoke, each with its documented exit code.

A message has one form: *where: what is wrong (found X, expected Y); do Z*. It is printed as one
line without a traceback (``--debug`` shows it). Anything else that escapes is our own fault: exit 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

OK = 0
UNEXPECTED = 1
STOPPED = 75  # stopped by a signal, checkpoint written: the same command with resume= continues


class MtlError(Exception):
    """Base of all errors that are reported as a message, not as a traceback."""

    exit_code = UNEXPECTED


class ConfigError(MtlError):
    """The command line or the configuration is wrong; carries every problem found at once."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(MtlError):
    """Data are missing or bad: names the file and the row."""

    exit_code = 3


class NonFiniteError(MtlError):
    """More non-finite steps than the budget allows; names the task, the step and the files."""

    exit_code = 4


class ResourceError(MtlError):
    """Out of memory, or a data worker or a rank died."""

    exit_code = 5


class CheckpointError(MtlError):
    """A checkpoint is damaged, does not fit, or was written by a newer version."""

    exit_code = 6


class SweepError(MtlError):
    """Some jobs of a sweep failed; the others finished."""

    exit_code = 7


class RunDirError(MtlError):
    """The run directory is locked by another process or cannot be written."""

    exit_code = 8


class SafetyError(MtlError):
    """Refused for safety: code or files that the user has not allowed."""

    exit_code = 9


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for a near miss, else an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
