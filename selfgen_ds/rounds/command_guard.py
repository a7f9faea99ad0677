"""A process between a rank and the user's command: however the rank ends, nothing of the command outlives it.

    python -m selfgen_ds.rounds.command_guard COMMAND [ARGUMENT...]

The rank holds the other end of this process's standard input. When that end closes, because the rank wants the command
to end or because the rank was killed, the guard ends every process of the command's group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

_GRACE = 10.0  # seconds from SIGTERM to SIGKILL


def main() -> int:
    """Run the command, and return its exit status, or 128 + n if the signal n ended it."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # launchers send these to all processes that a rank has started
        signal.signal(number, lambda *_: threading.Thread(target=_end, args=(command,)).start())
    threading.Thread(target=_end_with_the_rank, args=(command,), daemon=True).start()
    code = command.wait()
    _signal_group(command, signal.SIGKILL)  # processes that the command has left behind, such as a server
    return code if code >= 0 else 128 - code


def _end_with_the_rank(command: subprocess.Popen[bytes]) -> None:
    """Wait until the rank closes its end of the standard input, then end the command."""
    os.read(0, 1)
    _end(command)


def _end(command: subprocess.Popen[bytes]) -> None:
    """Ask the command's processes to end, and kill them if the command is still there after some seconds."""
    _signal_group(command, signal.SIGTERM)
    try:
        command.wait(_GRACE)
    except subprocess.TimeoutExpired:
        _signal_group(command, signal.SIGKILL)


def _signal_group(command: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(command.pid, number)


if __name__ == "__main__":
    sys.exit(main())
