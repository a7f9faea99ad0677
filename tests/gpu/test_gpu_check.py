"""`benchmarks/gpu_check.py`: what all checks find on the device that is here, and a check that fails or hangs.

Without a GPU, the checks run on the CPU at small sizes: the same code, other figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import psutil
import pytest
import torch
from gpu_checks.rows import Report, rows_of

from tests.ranks import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", DEVICE]
    done = subprocess.run([*command, "--output_dir", str(folder)], capture_output=True, text=True)
    [written] = folder.glob("gpu-*.json")
    read: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    assert done.returncode == (read["failed"] > 0), done.stderr
    return read


@pytest.mark.slow
@pytest.mark.timeout(gpu_check.TOTAL[DEVICE] + 60)  # the first case waits for all checks
@pytest.mark.parametrize("check", gpu_check.LIMITS)
def test_a_check_finds_nothing_wrong(record: dict[str, Any], check: str) -> None:
    rows = [row for row in record["rows"] if row["check"] == check]
    assert [row for row in rows if row["verdict"] == "failed"] == [], record["logs_of_failed"].get(check)
    assert [row for row in rows if row["verdict"] == "ok"]


@pytest.mark.slow
def test_the_record_names_the_machine_and_the_versions(record: dict[str, Any]) -> None:
    environment = record["environment"]
    assert environment["hardware"]["ranks"] == 1
    assert {"python", "torch", "deepspeed", "transformers", "selfgen_ds source"} <= environment["packages"].keys()


@pytest.mark.slow
def test_what_a_cpu_cannot_do_is_in_the_table(record: dict[str, Any]) -> None:
    skipped = {row["what"]: row["measured"] for row in record["rows"] if row["verdict"] == "skipped"}
    assert all(skipped.values())
    if DEVICE == "cpu":
        assert {"free memory", "flash_attention_2, packed", "flex_attention, packed"} <= skipped.keys()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'benchmarks'}")


@pytest.mark.usefixtures("environment")
def test_a_check_that_fails_keeps_its_rows_and_says_why(tmp_path: Path) -> None:
    *before, last = gpu_check.run("tests.gpu.fails", "cuda", tmp_path, 60.0)
    assert [(row.what, row.verdict) for row in before] == [("before", "ok"), ("slow", "not")]
    assert (last.verdict, last.measured) == ("failed", "ValueError: no such kernel")


@pytest.mark.usefixtures("environment")
def test_a_check_that_hangs_is_ended_with_the_processes_that_it_started(tmp_path: Path) -> None:
    seconds = 10.0
    first, last = gpu_check.run("tests.gpu.hangs", "cpu", tmp_path, seconds)
    assert (last.verdict, last.measured) == ("failed", "did not end within 10 s")
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child := int(first.measured)) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_figures_are_compared_only_on_a_gpu(tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        report = Report(device, device, tmp_path)
        for value in (1.0, 5.0):
            report.figure("time", value, "s", (0.5, 2.0))
        report.figure("rate", 1.0, "per second")
    assert [row.verdict for row in rows_of(tmp_path, "cuda")] == ["ok", "not", "shown"]
    assert [row.verdict for row in rows_of(tmp_path, "cpu")] == ["shown"] * 3
