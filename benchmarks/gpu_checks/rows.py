"""The rows of a check: what was expected, what was measured, and whether that holds."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gpu_checks.sizes import SIZES, Sizes

Verdict = Literal["ok", "not", "failed", "shown", "skipped"]
"""`ok`: as expected. `not`: a time or a rate outside the expected range, which fails nothing. `failed`: a result is
wrong, or the check did not end. `shown`: nothing was expected. `skipped`: this device cannot do it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table."""

    check: str
    what: str
    expected: str
    measured: str
    verdict: Verdict
    seconds: float
    """Time since the row before, or since the start of the check."""
    value: float | None = None
    """The figure of `measured`, if it is one."""


class Report:
    """Writes the rows of a check to a file as they are measured, so that a check that is killed leaves those it had.

    Args:
        check: Name of the check.
        device: `cuda` or `cpu`.
        folder: Folder of all checks' files. A check may write to `folder / check`.
    """

    def __init__(self, check: str, device: str, folder: Path) -> None:
        self.check, self.device = check, device
        self.sizes: Sizes = SIZES[device]
        self.all_checks = folder
        self.folder = folder / check
        self._before = time.monotonic()

    def result(self, what: str, expected: str, measured: str, holds: bool) -> None:
        """Report something that is right or wrong, whatever the speed of the device."""
        self._write(what, expected, measured, "ok" if holds else "failed")

    def figure(self, what: str, value: float, unit: str, expected: tuple[float, float] | None = None) -> None:
        """Report a time, a rate or a ratio of them.

        Args:
            expected: The smallest and the largest value that one H100 or H200 is expected to give.
        """
        measured = f"{value:.4g} {unit}".strip()
        if expected is None or self.device != "cuda":
            self._write(what, "", measured, "shown", value)
            return
        low, high = expected
        verdict: Verdict = "ok" if low <= value <= high else "not"
        self._write(what, f"{low:g} to {high:g} {unit}".strip(), measured, verdict, value)

    def shown(self, what: str, measured: str) -> None:
        """Report a fact of which nothing is expected."""
        self._write(what, "", measured, "shown")

    def skipped(self, what: str, reason: str) -> None:
        """Report something that this device or machine cannot do."""
        self._write(what, "", reason, "skipped")

    def _write(self, what: str, expected: str, measured: str, verdict: Verdict, value: float | None = None) -> None:
        now = time.monotonic()
        row = Row(
            check=self.check,
            what=what,
            expected=expected,
            measured=measured,
            verdict=verdict,
            seconds=round(now - self._before, 1),
            value=value,
        )
        self._before = now
        with open(path_of(self.all_checks, self.check), "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def path_of(folder: Path, check: str) -> Path:
    """Return the file of a check's rows."""
    return folder / f"{check}.jsonl"


def rows_of(folder: Path, check: str) -> list[Row]:
    """Return the rows that a check has reported so far."""
    path = path_of(folder, check)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]
