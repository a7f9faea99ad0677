"""How a pilot starts its commands: on which devices, with which variables, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer

import pytest

from selfgen_ds.errors import InputError, RunFailed, Stopped
from selfgen_ds.pilot import launching
from selfgen_ds.pilot.launching import Place, places
from tests.ranks import ROOT

ONE = Place(ranks=1, devices=[], threads=1)


def _stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a shell script take the place of Python for the commands that are started; return the log."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(launching.sys, "executable", str(python))
    return folder / "logs" / "run-0.5-1.log"


def test_jobs_divide_the_devices_and_threads_of_a_host(caplog: pytest.LogCaptureFixture) -> None:
    two = places(2, 3, [str(number) for number in range(8)])
    assert [place.devices for place in two] == [["0", "1", "2"], ["3", "4", "5"]]
    assert [place.devices for place in places(1, 1, [])] == [[]]
    cores = len(os.sched_getaffinity(0))
    assert {place.threads for place in places(1, 1, [])} == {cores}
    assert not caplog.messages
    assert {place.threads for place in places(64, 64, [])} == {1}
    assert caplog.messages == [f"--jobs, --ranks: 4096 processes at a time share {cores} cores"]
    with pytest.raises(InputError, match="expected at most 4 ranks on this host, got 2 jobs of 3 ranks"):
        places(2, 3, ["0", "1", "2", "3"])


def test_commands_that_are_started_together_get_different_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = _stand_in(tmp_path, 'echo "$MASTER_PORT"', monkeypatch)
    ports = iter([20_001, 20_001, 20_002])
    monkeypatch.setattr(launching.process_group, "free_port", lambda: next(ports))
    for _ in range(2):
        launching.run(["train"], ONE, log, Event())
    assert log.read_text().split() == ["20001", "20002"]


def test_every_rank_gets_its_number_and_writes_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    told = 'echo "$RANK of $WORLD_SIZE, $LOCAL_RANK at $MASTER_ADDR: $*"'
    log = _stand_in(tmp_path, told, monkeypatch)
    launching.run(["train", "--seed", "1"], Place(ranks=2, devices=[], threads=1), log, Event())
    lines = sorted(log.read_text().splitlines())
    assert lines == [f"{rank} of 2, {rank} at 127.0.0.1: -m selfgen_ds train --seed 1" for rank in (0, 1)]
    printed = tmp_path / "printed"
    launching.run(["probe"], ONE, log, Event(), printed)
    assert printed.read_text() == "0 of 1, 0 at 127.0.0.1: -m selfgen_ds probe\n"


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        ("echo 'selfgen-ds: error: rows: bad' >&2; exit 2", InputError, r"^rows: bad$"),
        (
            "echo 'selfgen-ds: error: out of luck'; exit 1",
            RunFailed,
            r"`selfgen-ds train` failed: out of luck \(.*log\)",
        ),
        ("echo last words; kill -KILL $$", RunFailed, r"`selfgen-ds train` failed: last words \("),
        ("exit 3", Stopped, "^$"),
    ],
)
def test_the_end_of_a_command_is_told(
    script: str, error: type[Exception], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = _stand_in(tmp_path, script, monkeypatch)
    log.parent.mkdir()
    log.write_text("selfgen-ds: error: of an earlier start\n")
    with pytest.raises(error, match=told):
        launching.run(["train"], ONE, log, Event())


def test_a_signal_is_passed_on_and_the_command_may_end_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = _stand_in(tmp_path, "trap 'echo saved; exit 3' TERM; while :; do sleep 0.1; done", monkeypatch)
    stop = Event()
    Timer(1.0, stop.set).start()
    with pytest.raises(Stopped):
        launching.run(["train"], ONE, log, stop)
    assert log.read_text() == "saved\n"


def test_a_command_dies_with_the_process_that_has_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = _stand_in(tmp_path, 'echo $$ > "$0.pid"; exec sleep 60', monkeypatch)
    code = (
        "from pathlib import Path; from threading import Event; from selfgen_ds.pilot import launching as l; "
        f"l.sys.executable = {str(tmp_path / 'python')!r}; "
        f"l.run(['train'], l.Place(ranks=1, devices=[], threads=1), Path({str(log)!r}), Event())"
    )
    monkeypatch.undo()
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    file = tmp_path / "python.pid"
    _until(lambda: file.exists() and file.read_text().endswith("\n"), 60)
    child = int(file.read_text())
    assert _lives(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not _lives(child), 10)


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
