"""The one exception for what a user can mend. Entry points print it as a line and exit with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: the message says what, where, the value, and what to do. Never wraps a bug of ours."""


class OwnError(UserError):
    """A mistake that this process met alone, not every rank alike: it has to tell of it itself."""


class Interrupted(SystemExit):
    """A run was stopped by a signal, in order; ends the process with 128 + its number, as shells tell it."""

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.message = message


def suggest(word: str, known: Iterable[str]) -> str:
    """' (did you mean x?)' for the nearest known word, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def first_line(error: BaseException) -> str:
    """A library's error, for the end of a line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
