"""The signals with which schedulers and launchers ask a run to stop, and the reactions to them outside of `Watch`."""

from __future__ import annotations

import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = 3
"""Exit code of a run that was stopped by a signal: everything is saved, and the launcher may start the run again."""
INTERRUPTED = 130
"""Exit code of a run that a second Ctrl-C ended without saving."""
BEFORE = "stopped by a signal before the first step"


def stop_at_once() -> None:
    """Exit on a signal from now on. This is for the imports and the start of a run, when there is nothing to save."""
    for number in SIGNALS:
        signal.signal(number, exit_stopped)


def exit_stopped(*_: object) -> None:
    """Exit with the code `STOPPED`, without clean-up."""
    os.write(2, f"selfgen-ds: {BEFORE}\n".encode())
    os._exit(STOPPED)


def ignore() -> None:
    """Ignore signals from now on, except for Ctrl-C, which ends the process.

    When the first rank ends, launchers send SIGTERM to all others, which still have to say why they end.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
