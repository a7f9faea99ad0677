"""The exceptions that end a command in an orderly way, and the list of problems that becomes one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input or configuration: one clear line per problem for the user, and exit code 2."""


class Stopped(Exception):
    """A signal asked for the run to end. Every rank raises this at the same point; the command exits with code 3."""


class RunFailed(Exception):
    """A run that was started by another command failed: one line that names its log, and exit code 1."""


class Problems:
    """Problems of the user's input, one line each, collected so that one `InputError` reports all of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        """Add problems that are already worded."""
        self.lines += lines

    def expect(self, holds: bool, setting: str, expected: str, value: object) -> None:
        """Add `setting: expected ..., got ...` unless the condition holds."""
        if not holds:
            self.lines.append(f"{setting}: expected {expected}, got {value!r}")

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Add the lines of an `InputError` that the block raises, and continue after the block."""
        try:
            yield
        except InputError as error:
            self.lines += str(error).splitlines()

    def raise_all(self) -> None:
        """Raise all problems together, each once.

        Raises:
            InputError: There is a problem.
        """
        if self.lines:
            raise InputError("\n".join(dict.fromkeys(self.lines)))
