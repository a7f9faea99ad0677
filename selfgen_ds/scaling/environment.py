"""The machine, the versions, and the commit that a figure was measured with."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from selfgen_ds import __version__
from selfgen_ds.versions import libraries

# Dense bfloat16 operations per second (without sparsity), from NVIDIA's data sheets.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def environment() -> dict[str, Any]:
    """Return the command, date, commit, hardware, and versions of this run."""
    return {
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {"selfgen_ds": __version__} | libraries(),
    }


def hardware() -> dict[str, Any]:
    """Return the accelerator, the CPU, and the number of ranks of this run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "accelerator": "cpu" if get_accelerator().device_name() == "cpu" else torch.cuda.get_device_name(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "ranks": dist.get_world_size(),
    }


def peak_flops() -> float | None:
    """Return the accelerator's dense bfloat16 operations per second; None if unknown."""
    if get_accelerator().device_name() == "cpu":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in _PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def commit() -> str | None:
    """Return the commit of the checkout that runs, with a `+` if tracked files differ; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no", ":/"))
    except (OSError, subprocess.CalledProcessError):
        return None
