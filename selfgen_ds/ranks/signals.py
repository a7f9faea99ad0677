"""The signals with which a scheduler or launcher asks a rank for its end, outside of `Watch`."""

from __future__ import annotations

import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 3
"""Exit code: stopped by a signal; everything is saved, start me again."""
BEFORE = "stopped by a signal before the first step"


def stop_at_once() -> None:
    """On a signal while imports go on: there is nothing to save."""
    for number in SIGNALS:
        signal.signal(number, _stop_at_once)


def _stop_at_once(*_: object) -> None:
    os.write(2, f"selfgen-ds: {BEFORE}\n".encode())
    os._exit(STOPPED)


def ignore() -> None:
    """At the end: launchers send SIGTERM to the ranks that are left, which still have to say why they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
