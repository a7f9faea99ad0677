"""Rows of a source, for tests of what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.data.row_checks import Refused, Row, TextPair
from selfgen_ds.errors import InputError


def usable(rows: Iterable[Row]) -> list[TextPair | Conversation]:
    """Return the rows of a source.

    Raises:
        InputError: A row cannot be used, for this reason.
    """
    kept: list[TextPair | Conversation] = []
    for row in rows:
        if isinstance(row, Refused):
            raise InputError(row.reason)
        kept.append(row)
    return kept
