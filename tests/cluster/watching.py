"""Helpers that watch runs: their losses, their environment, and the processes that they leave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import Host
from tests.ranks import Launched

HOSTILE = "a b'c\"$(touch made)`touch made`;*%n%h\\ \n{x,y} ~ ü"
"""A text whose characters shells, pdsh and YAML would change."""


def losses(run: Path) -> list[float]:
    """Return the losses of the steps that a run has logged."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def wait_until(done: Callable[[], bool], run: Launched | None = None, timeout: float = 120.0) -> None:
    """Wait until `done()` is true.

    Raises:
        AssertionError: `timeout` seconds have passed, or `run` has ended before.
    """
    deadline = time.monotonic() + timeout
    while not done():
        assert run is None or run.process.poll() is None, run.output()[-3000:]
        assert time.monotonic() < deadline, "not in time" if run is None else run.output()[-3000:]
        time.sleep(0.1)


def environment(process: int) -> dict[str, str]:
    """Return the environment with which a process was started."""
    words = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def nothing_is_left(nodes: list[Host]) -> bool:
    """Return whether only daemons run on the hosts."""
    return not any(host.processes().keys() - host.daemons for host in nodes)
