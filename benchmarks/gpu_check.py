"""Check on one GPU what a CPU cannot show, and measure what depends on it: `make gpu-check`, docs/gpu.md.

    python benchmarks/gpu_check.py [--device cpu] [--only machine one_step] [--output_dir benchmarks/results]

Every check is a module of `gpu_checks/` and runs in a process of its own, with a time limit, so that a check that fails
or hangs stops no other one. Prints a table of what was expected and measured, and writes it to `gpu-NAME.json`, named
after the GPU; with `--only`, nothing is written. Exit code: 1 if any result was wrong or any check did not end; a slow
figure is shown and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_checks.rows import Row, rows_of

from selfgen_ds.files import write_atomically
from selfgen_ds.ranks import environment

ROOT = Path(__file__).parent.parent
LIMITS = {
    "machine": 60,
    "loss_and_draw": 90,
    "kill_and_resume": 120,
    "one_step": 90,
    "pass_cost": 180,
    "large_model": 110,
    "packed_rows": 110,
    "drawing_rates": 120,
    "stalled_backward": 70,
}
"""Check -> the seconds that it may take on a GPU; the checks that show most come first."""
TOTAL = {"cuda": 540, "cpu": 1800}
"""Device -> the seconds that all checks may take together: with the installation, ten minutes on a GPU."""
ON_CPU = 300
"""Seconds that any one check may take on a CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(TOTAL), default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=[], metavar="CHECK")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    output_dir = options.output_dir.resolve()
    os.chdir(ROOT)
    folder = ROOT / "runs" / "gpu-check" / str(os.getpid())
    folder.mkdir(parents=True)
    _set_environment(options.device, folder)
    started, rows, logs = time.monotonic(), list[Row](), dict[str, str]()
    print("| check | what | expected | measured | | seconds |\n|---|---|---|---|---|---|", flush=True)
    for name in options.only or LIMITS:
        left = TOTAL[options.device] - (time.monotonic() - started)
        limit = LIMITS[name] if options.device == "cuda" else ON_CPU
        of_check = run(f"gpu_checks.{name}", options.device, folder, min(limit, max(1.0, left)))
        rows += of_check
        for row in of_check:
            _show(row)
        if any(row.verdict == "failed" for row in of_check):
            logs[name] = _log(folder, name)[-4000:]
            print(f"\n{logs[name]}\n", flush=True)
        if not options.only:  # a record has all checks, as far as they have run
            write(output_dir, folder, options.device, rows, logs, time.monotonic() - started)
    wrong = sum(row.verdict == "failed" for row in rows)
    print(f"\n{len(rows)} rows, {wrong} failed, {time.monotonic() - started:.0f} s")
    if wrong:
        print(f"the files of the checks are in {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(wrong > 0)


def _show(row: Row) -> None:
    """Print a row of the table."""
    cells = row.check, row.what, row.expected, row.measured, row.verdict, f"{row.seconds:g}"
    print("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |", flush=True)


def _set_environment(device: str, folder: Path) -> None:
    """Set the variables that all checks and the commands they start inherit."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {
        "DS_ACCELERATOR": device,
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }
    environment.set_defaults(os.environ)


def run(module: str, device: str, folder: Path, seconds: float) -> list[Row]:
    """Run a check in a process of its own; then end that process, if it still runs, and all that it has started.

    Args:
        module: Module with a function `check`.

    Returns:
        The rows of the check, with one more if it failed or was ended.
    """
    name = module.rpartition(".")[2]
    (folder / name).mkdir()
    started = time.monotonic()
    with open(folder / f"{name}.log", "wb") as log:
        command = [sys.executable, "-m", "gpu_checks", module, device, str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = rows_of(folder, name)
    if code != 0:
        lines = _log(folder, name).splitlines() or [f"exit code {code}"]
        why = f"did not end within {seconds:.0f} s" if code is None else lines[-1]
        took = round(time.monotonic() - started, 1)
        rows.append(Row(check=name, what="the check", expected="ends", measured=why, verdict="failed", seconds=took))
    return rows


def _log(folder: Path, name: str) -> str:
    path = folder / f"{name}.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def write(output_dir: Path, folder: Path, device: str, rows: list[Row], logs: dict[str, str], seconds: float) -> None:
    """Write the record of the checks that have run, named after the GPU."""
    path = folder / "environment.json"  # the check `machine` writes it
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    name = str(found.get("hardware", {}).get("accelerator", device))
    record = {
        "environment": found,
        "device": device,
        "seconds": round(seconds, 1),
        "failed": sum(row.verdict == "failed" for row in rows),
        "rows": [asdict(row) for row in rows],
        "logs_of_failed": logs,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    target = output_dir / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    write_atomically(target, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
