"""What a benchmark found: its ratios, the record, the table and the plot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import deepspeed
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from selfgen_ds import __version__
from selfgen_ds.files import write_atomically

PHASES = ("pass", "forward", "backward", "optimizer", "other")
"""Of a step's time; `other` is what is left of it: sums over ranks, counts."""

_SHOWN = ("pass", "forward", "backward")

# Dense bfloat16 operations a second, without sparsity, of the makers' data sheets.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def row(times: list[list[float]], sft_times: list[list[float]]) -> dict[str, Any]:
    """Statistics of a variant's steps.

    Args:
        times: Seconds of every step, by phase (`PHASES`), and the whole step's.
        sft_times: Of sft in the same turns.

    Returns:
        Median and quartiles of the step and its phases, in seconds; `step_time_ratio`, the median over turns of the
        step's time through sft's in the same turn, and its quartiles.
    """
    seconds, base = np.array(times), np.array(sft_times)

    def quartiles(values: np.ndarray) -> list[float]:
        return [float(v) for v in np.percentile(values, [25, 50, 75])]

    low, median, high = quartiles(seconds[:, -1] / base[:, -1])
    return {
        "step_time_s": quartiles(seconds[:, -1]),
        "phases_s": {name: quartiles(column) for name, column in zip(PHASES, seconds.T, strict=False)},
        "step_time_ratio": median,
        "step_time_ratio_quartiles": [low, high],
    }


def hardware() -> dict[str, Any]:
    """What the run is made on."""
    accelerator = get_accelerator()
    name = "cpu"
    if accelerator.device_name() != "cpu":
        name = torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "accelerator": name,
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads_a_rank": torch.get_num_threads(),
        "ranks": dist.get_world_size(),
    }


def peak_flops() -> float | None:
    """Of the accelerator in bfloat16, where it is known."""
    if get_accelerator().device_name() == "cpu":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


def record(settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything to judge a figure by."""
    return {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": {
            "selfgen_ds": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "deepspeed": deepspeed.__version__,
        },
        **settings,
        "rows": rows,
    }


def _commit() -> str | None:
    """Of the source that runs; `+` where it was changed since. None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "."))
    except (OSError, subprocess.CalledProcessError):
        return None


def write(folder: Path, found: dict[str, Any]) -> None:
    """`bench.json`, `bench.png`, and the table on the terminal."""
    write_atomically(folder / "bench.json", json.dumps(found, indent=1) + "\n")
    _plot(found["rows"], folder / "bench.png")
    console = Console(highlight=False, width=max(120, Console().width))
    for accumulation, checkpointing in dict.fromkeys((r["accumulation"], r["checkpointing"]) for r in found["rows"]):
        some = [r for r in found["rows"] if (r["accumulation"], r["checkpointing"]) == (accumulation, checkpointing)]
        on = "with" if checkpointing else "without"
        console.print(_table(f"accumulation {accumulation}, {on} activation checkpointing", some))
    console.print("time and memory: through sft's; gathers: copies of all parameters a step")
    console.print(f"written to {folder}/bench.json and bench.png")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    names = ["p, passes", "time", "quartiles", "memory", "gathers", "passes", "step ms", *_SHOWN, "tokens/s"]
    if rows[0]["mfu"] is not None:
        names.append("MFU")
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right", no_wrap=True)
    for r in rows:
        cells = [
            r["variant"],
            f"{r['step_time_ratio']:.3f}",
            " ".join(f"{ratio:.3f}" for ratio in r["step_time_ratio_quartiles"]),
            f"{r['peak_memory_ratio']:.3f}",
            f"{r['gathers']:.2f}",
            str(r["passes"]),
            f"{1e3 * r['step_time_s'][1]:.0f}",
            *(f"{1e3 * r['phases_s'][name][1]:.0f}" for name in _SHOWN),
            f"{r['tokens_per_second']:.0f}",
        ]
        if r["mfu"] is not None:
            cells.append(f"{r['mfu']:.1%}")
        table.add_row(*cells)
    return table


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Each variant's phases, as shares of its block's sft."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(rows)), layout="constrained")
    names, base = [], 1.0
    for place, r in enumerate(rows):
        if r["variant"] == "sft":
            base = r["step_time_s"][1]
        names.append(f"{r['variant']} (x{r['accumulation']}{'' if r['checkpointing'] else ', no checkpointing'})")
        left = 0.0
        for number, phase in enumerate(PHASES):
            width = r["phases_s"][phase][1] / base
            axes.barh(place, width, left=left, color=f"C{number}", label=phase if place == 0 else None)
            left += width
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.axvline(1.25, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("step time, sft = 1")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
