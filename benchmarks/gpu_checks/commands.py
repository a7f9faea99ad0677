"""Start `selfgen-ds` in a process of its own, as a user does on one GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def start(log: Path, *arguments: str, program: tuple[str, ...] = ("-m", "selfgen_ds")) -> subprocess.Popen[bytes]:
    """Start `selfgen-ds ARGUMENTS` with its output in a file; the check's own end also ends it."""
    with open(log, "wb") as output:
        return subprocess.Popen([sys.executable, *program, *arguments], stdout=output, stderr=subprocess.STDOUT)


def output_of(log: Path) -> str:
    """Return what a command has printed so far."""
    return log.read_text(encoding="utf-8", errors="replace")


def expect_success(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a command.

    Raises:
        RuntimeError: It failed; the message is the end of its output.
    """
    if process.wait() != 0:
        raise RuntimeError(f"exit code {process.returncode}: {output_of(log)[-3000:]}")
