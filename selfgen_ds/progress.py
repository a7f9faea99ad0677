"""Progress of long work: a bar on a terminal, and a line every few seconds in a file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 5.0
"""Least time between two lines of a piece of work."""
_UP = "\x1b[A"  # moves to the line of an outer bar
_LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}"
_LINE_WITHOUT_TOTAL = "{desc}: {unit} {n_fmt}, {elapsed} so far, {rate_fmt}{postfix}"


def bar(desc: str, unit: str, **settings: Any) -> tqdm:
    """Return a progress bar.

    Args:
        settings: Those of `tqdm`, such as `total`, `initial`, `leave` and `disable`.
    """
    if _is_terminal():
        return tqdm(desc=desc, unit=unit, **settings)
    form = _LINE if settings.get("total") is not None else _LINE_WITHOUT_TOTAL
    return tqdm(
        desc=desc,
        unit=unit,
        **settings | {"mininterval": SECONDS, "maxinterval": SECONDS, "bar_format": form, "file": _Lines()},
    )


def _is_terminal() -> bool:
    """Return whether stderr is a terminal with a width: on one of no columns, as some containers have, no bar shows."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # it has no size
        return sys.stderr.isatty()


def line_is_open() -> bool:
    """Return whether a bar is on the last line of stderr: on a terminal one of ours, in a file that of a library."""
    # A bar that another thread is about to make has no file yet.
    return any(getattr(shown, "fp", None) == sys.stderr for shown in list(getattr(tqdm, "_instances", ())))


class _Lines:
    """A file for a progress bar that turns every state of the bar into a line on stderr."""

    def write(self, text: str) -> None:
        """Write a state of the bar, but none of the control characters with which a bar moves on a terminal."""
        if state := text.replace("\r", "").replace(_UP, "").strip():
            sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {state}\n")

    def flush(self) -> None:
        """Pass what was written on."""
        sys.stderr.flush()
