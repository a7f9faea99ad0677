"""Pilots for tests: the commands that a pilot starts are forked from a process with the slow imports done."""

from __future__ import annotations

import os
import sys
from multiprocessing import set_start_method
from typing import IO, Any

import pytest
import torch

from selfgen_ds.pilot import launching
from tests.ranks import ENVIRONMENT, ROOT, forks


class Forked:
    """What `subprocess.Popen` does for `python -m selfgen_ds ARGUMENTS`, as far as a pilot uses it."""

    def __init__(self, command: list[str], env: dict[str, str], stdout: IO[bytes], stderr: IO[bytes], **_: Any) -> None:
        own = {name: value for name, value in env.items() if os.environ.get(name) != value}
        self._process = forks().Process(target=_command, args=(command[3:], stdout.name, stderr.name, own), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that has ended the process."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code if the process has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        if self._process.is_alive():
            os.kill(self._process.pid or 0, number)


def fork_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pilots of this test fork their commands."""
    monkeypatch.setattr(launching.subprocess, "Popen", Forked)


def _command(arguments: list[str], stdout: str, stderr: str, variables: dict[str, str]) -> None:
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT | variables
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # as in a launched process; "forkserver" would name its semaphores
    from selfgen_ds.cli import main

    sys.argv = ["selfgen-ds", *arguments]
    main()
