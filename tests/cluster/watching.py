"""What runs leave behind, and waiting for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from tests.ranks import Launched


def losses(run: Path) -> list[float]:
    """Of the steps that are done."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def wait_until(done: Callable[[], bool], run: Launched | None = None, timeout: float = 60.0) -> None:
    """Fails after `timeout` seconds, or when `run` ends before."""
    deadline = time.monotonic() + timeout
    while not done():
        assert run is None or run.process.poll() is None, run.output()[-3000:]
        assert time.monotonic() < deadline, "not in time" if run is None else run.output()[-3000:]
        time.sleep(0.1)
