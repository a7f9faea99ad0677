"""A check that starts a process, writes down its id, and never ends."""

from __future__ import annotations

import subprocess
import sys
import time

from gpu_checks.rows import Report


def check(report: Report) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.shown("child", str(child.pid))
    time.sleep(600)
