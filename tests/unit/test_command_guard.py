"""The guard of a user's command: it passes the exit status on, and ends every process of the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TREE = "sleep 600 & echo $! > pids; echo $$ >> pids; wait"
"""A shell that starts a process, tells both ids, and waits."""
STUBBORN = f"trap '' TERM; {TREE}"


def _start(folder: Path, script: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "selfgen_ds.rounds.command_guard", "bash", "-c", script]
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=folder, env=os.environ | {"PYTHONPATH": os.getcwd()})


def _ids(folder: Path) -> list[int]:
    """Return the ids of the processes that `TREE` has started."""
    deadline = time.monotonic() + 20.0
    while not (folder / "pids").exists() or len(ids := (folder / "pids").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(number) for number in ids]


def _are_gone(ids: list[int]) -> bool:
    deadline = time.monotonic() + 20.0
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in ids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_status_is_the_commands(tmp_path: Path, script: str, status: int) -> None:
    with _start(tmp_path, script) as guard:
        assert guard.wait(20.0) == status


def test_processes_that_the_command_leaves_behind_are_ended(tmp_path: Path) -> None:
    with _start(tmp_path, "sleep 600 & echo $! $$ > pids") as guard:
        assert guard.wait(20.0) == 0
    assert _are_gone(_ids(tmp_path))


def test_the_command_ends_when_the_rank_lets_go(tmp_path: Path) -> None:
    with _start(tmp_path, TREE) as guard:
        ids = _ids(tmp_path)
        assert guard.stdin is not None
        guard.stdin.close()
        assert guard.wait(20.0) == 128 + signal.SIGTERM
    assert _are_gone(ids)


@pytest.mark.test  # takes the ten seconds that the command gets to end by itself
def test_a_command_that_does_not_end_by_itself_is_killed(tmp_path: Path) -> None:
    with _start(tmp_path, STUBBORN) as guard:
        ids = _ids(tmp_path)
        assert guard.stdin is not None
        guard.stdin.close()
        assert guard.wait(30.0) == 128 + signal.SIGKILL
    assert _are_gone(ids)


def test_a_launcher_that_ends_all_processes_of_a_rank_ends_the_command_too(tmp_path: Path) -> None:
    with _start(tmp_path, TREE) as guard:
        ids = _ids(tmp_path)
        guard.send_signal(signal.SIGTERM)
        assert guard.wait(20.0) == 128 + signal.SIGTERM
    assert _are_gone(ids)
