"""A check that reports a row, a slow figure, and then fails."""

from __future__ import annotations

from gpu_checks.rows import Report


def check(report: Report) -> None:
    report.result("before", "1", "1", True)
    report.figure("slow", 3.0, "s", (1.0, 2.0))
    raise ValueError("no such kernel")
