"""Starts commands of `selfgen-ds` on ranks of this host, each command in processes of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from deepspeed.accelerator import get_accelerator

from selfgen_ds.errors import InputError, RunFailed, Stopped
from selfgen_ds.ranks import process_group, signals

log = logging.getLogger("selfgen_ds")

_SECONDS = 0.2  # between two looks at the processes
_PORTS: set[int] = set()  # given to a command, which may not listen yet
_PORTS_LOCK = Lock()
_LIBC = ctypes.CDLL(None)  # loaded here, because after a fork among threads only little is safe to call


@dataclass(frozen=True, kw_only=True)
class Place:
    """Share of this host for one command."""

    ranks: int
    """Processes that share the work."""
    devices: list[str]
    """The host's accelerators that they see; empty for all."""
    threads: int
    """Threads of each process, unless `OMP_NUM_THREADS` says otherwise."""


def places(jobs: int, ranks: int, devices: list[str]) -> list[Place]:
    """Divide this host among commands that run at the same time.

    Args:
        devices: The host's accelerators; empty on a CPU.

    Raises:
        InputError: There are too few accelerators.
    """
    if devices and jobs * ranks > len(devices):
        raise InputError(
            f"--jobs, --ranks: expected at most {len(devices)} ranks on this host, got {jobs} jobs of {ranks} ranks"
        )
    cores = len(os.sched_getaffinity(0))
    if not devices and jobs * ranks > cores:
        log.warning("--jobs, --ranks: %d processes at a time share %d cores", jobs * ranks, cores)
    threads = max(1, cores // (jobs * ranks))
    shares = [devices[job * ranks : (job + 1) * ranks] for job in range(jobs)]
    return [Place(ranks=ranks, devices=share, threads=threads) for share in shares]


def devices() -> list[str]:
    """Return the accelerators that this process may use; none on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return []
    given = os.environ.get(accelerator.visible_devices_envs()[0])
    return given.split(",") if given else [str(number) for number in range(accelerator.device_count())]


def run(arguments: list[str], place: Place, log: Path, stop: Event, output: Path | None = None) -> None:
    """Run a command on all its ranks until it is done.

    When one rank ends early, the others notice it by the heartbeat of `selfgen_ds.ranks`, and end too.

    Args:
        arguments: The sub-command and its options.
        log: File to which all ranks write what they print.
        stop: When it is set, the ranks are asked to save and to stop.
        output: File for what rank 0 prints to its standard output, instead of the log.

    Raises:
        InputError: The command refused its input, with the lines that it printed.
        Stopped: The ranks were asked to stop.
        RunFailed: It failed, with the last error line that it printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if log.exists() else 0
    processes = _start(arguments, place, log, output)
    asked = False
    while any(process.poll() is None for process in processes):
        if stop.is_set() and not asked:
            asked = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        time.sleep(_SECONDS)
    codes = [process.returncode for process in processes]
    if not any(codes):
        return
    if asked or signals.STOPPED in codes:
        raise Stopped
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(before)
        lines = file.read().splitlines()
    told = [line.split("error: ", 1)[1] for line in lines if "selfgen-ds: error: " in line]
    if 2 in codes:
        raise InputError("\n".join(dict.fromkeys(told)) or f"{log}: the command refused its input")
    raise RunFailed(f"`selfgen-ds {arguments[0]}` failed: {' '.join((told or lines or ['no output'])[-1:])} ({log})")


def _start(arguments: list[str], place: Place, log: Path, output: Path | None) -> list[subprocess.Popen[bytes]]:
    shared = os.environ | {"WORLD_SIZE": str(place.ranks), "LOCAL_WORLD_SIZE": str(place.ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port())}
    shared.setdefault("OMP_NUM_THREADS", str(place.threads))
    if place.devices:
        get_accelerator().set_visible_devices_envs(shared, place.devices)
    command, processes = [sys.executable, "-m", "selfgen_ds", *arguments], []
    with open(log, "ab") as errors, open(output or os.devnull, "wb") as printed:
        for rank in range(place.ranks):
            process = subprocess.Popen(
                command,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=errors if output is None or rank else printed,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches the ranks as `stop` alone
                preexec_fn=_die_with_parent,
            )
            processes.append(process)
    return processes


def _port() -> int:
    """Return a free port that no other command of this process was given."""
    with _PORTS_LOCK:
        while (port := process_group.free_port()) in _PORTS:
            pass
        _PORTS.add(port)
    return port


def _die_with_parent() -> None:
    """Let this process be killed when the one that started it dies: a run that goes on would hold its folder."""
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of Linux
