"""The exceptions that end a command in an orderly way."""

from __future__ import annotations


class InputError(Exception):
    """Bad input or configuration: one clear line per problem for the user, and exit code 2."""


class Stopped(Exception):
    """A signal asked for the run to end. Every rank raises this at the same point; the command exits with code 3."""
