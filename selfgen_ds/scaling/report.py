"""What a benchmark found: its ratios, the record, the table and the plot."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
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
from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from selfgen_ds import __version__
from selfgen_ds.files import write_atomically

PHASES = ("pass", "forward", "backward", "optimizer", "other")
"""Of a step's time; `other` is what is left of it: sums over ranks, counts."""

# Dense bfloat16 operations a second, without sparsity, of the makers' data sheets.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def row(times: list[list[float]], sft_times: list[list[float]]) -> dict[str, Any]:
    """Statistics of a variant's steps.

    Args:
        times: Seconds of every step, by phase (`PHASES`), and the whole step's.
        sft_times: Of sft in the same turns.

    Returns:
        Median and quartiles of the step and its phases, in seconds; the phases' medians through that of sft's step;
        `step_time_ratio`, the median over turns of the step's time through sft's in the same turn, and its quartiles.
    """
    seconds, base = np.array(times), np.array(sft_times)

    low, ratio, high = _quartiles(seconds[:, -1] / base[:, -1])
    step = _quartiles(seconds[:, -1])
    phases = {name: _quartiles(column) for name, column in zip(PHASES, seconds.T, strict=False)}
    return {
        "step_time_s": step[1],
        "step_time_s_quartiles": [step[0], step[2]],
        "phases_s": phases,
        "phases_ratio": {name: median / float(np.median(base[:, -1])) for name, (_, median, _) in phases.items()},
        "step_time_ratio": ratio,
        "step_time_ratio_quartiles": [low, high],
    }


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.percentile(values, [25, 50, 75])]


def ratios(its: dict[str, Any], sft: dict[str, Any], parameter_bytes: int) -> dict[str, Any]:
    """Memory and collectives beside sft's.

    Args:
        its: `peak_memory_bytes`, `gathered_bytes`, and `collectives`: calls and bytes by name.

    Returns:
        `gathers` and `extra_gathers` are in copies of all parameters. Collectives that sft does not make have no ratio.
    """
    return {
        "peak_memory_ratio": its["peak_memory_bytes"] / sft["peak_memory_bytes"],
        "gathers": its["gathered_bytes"] / parameter_bytes,
        "extra_gathers": (its["gathered_bytes"] - sft["gathered_bytes"]) / parameter_bytes,
        "collectives_ratio": {
            operation: {what: its["collectives"][operation][what] / value for what, value in counts.items() if value}
            for operation, counts in sft["collectives"].items()
            if operation in its["collectives"]
        },
    }


def rates(
    times: list[list[float]], tokens: int, parameters: int, world_size: int, peak: float | None
) -> dict[str, float | None]:
    """Tokens a second over all ranks, and the model FLOPs utilisation of each: 6 operations a parameter and token.

    Neither what checkpointing computes again nor the pass counts as the model's.

    Args:
        tokens: Of a step, over all ranks.
        peak: Operations a second of an accelerator, where known.
    """
    seconds = _quartiles(np.array(times)[:, -1])[1]
    flops = tokens * 6 * parameters / world_size
    return {"tokens_per_second": tokens / seconds, "mfu": None if peak is None else flops / seconds / peak}


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
    return next((peak for known, peak in _PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def environment() -> dict[str, Any]:
    """Everything to judge a figure by."""
    return {
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {
            "selfgen_ds": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "deepspeed": deepspeed.__version__,
        },
    }


def commit() -> str | None:
    """Of the checkout that runs; `+` where it was changed since. None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no", ":/"))
    except (OSError, subprocess.CalledProcessError):
        return None


def save(folder: Path, found: dict[str, Any]) -> None:
    """What was found up to now: `bench.json`."""
    write_atomically(folder / "bench.json", json.dumps(found, indent=1) + "\n")


def show(folder: Path, found: dict[str, Any]) -> None:
    """`bench.png`, and the tables on the terminal."""
    _plot(found, folder / "bench.png")
    console = Console(highlight=False, width=max(150, Console().width))
    steps = found["rows"]
    for block in dict.fromkeys(map(_block, steps)):
        some = [r for r in steps if _block(r) == block]
        accumulation, checkpointing = block
        on = "with" if checkpointing else "without"
        console.print(_table(f"steps: accumulation {accumulation}, {on} activation checkpointing", _step_cells(some)))
    if steps:
        console.print(
            "time, memory and phases: through sft's step time and peak; gathers: copies of all parameters a step\n"
        )
    if losses := found["losses"]:
        title = f"the loss: {losses[0]['tokens']} targets, {losses[0]['vocabulary']} words"
        console.print(_table(title, [_loss_cells(r) for r in losses]))
    if found["drawing"]:
        console.print(_table("rounds of one epoch: answer tokens a second", [_draw_cells(r) for r in found["drawing"]]))
        console.print("x: through generate()'s; passes: gathered, sharded; drawing: its share of the round's time with")
        console.print("weights gathered; epoch: that time through an epoch of sft\n")
    console.print(f"written to {folder}/bench.json and bench.png")


def _block(r: dict[str, Any]) -> tuple[int, bool]:
    return r["gradient_accumulation_steps"], r["activation_checkpointing"]


def _name(r: dict[str, Any]) -> str:
    return "sft" if r["variant"] == "sft" else f"p {r['replace_probability']:g}, {r['passes']}"


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*cells.values())
    return table


def _step_cells(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    mfu = [{} if r["mfu"] is None else {"MFU": f"{r['mfu']:.1%}"} for r in rows]
    return [
        {
            "p, passes": _name(r),
            "time": f"{r['step_time_ratio']:.3f}",
            "quartiles": " ".join(f"{ratio:.3f}" for ratio in r["step_time_ratio_quartiles"]),
            "memory": f"{r['peak_memory_ratio']:.3f}",
            "gathers": f"{r['gathers']:.2f}",
            "passes": str(r["passes_made"]),
            "groups": str(r["groups"]),
            **{name: f"{ratio:.2f}" for name, ratio in r["phases_ratio"].items()},
            "step ms": f"{1e3 * r['step_time_s']:.0f}",
            "tokens/s": f"{r['tokens_per_second']:.0f}",
            **more,
        }
        for r, more in zip(rows, mfu, strict=True)
    ]


def _loss_cells(r: dict[str, Any]) -> dict[str, str]:
    return {
        "loss": r["loss"],
        "memory": f"{r['peak_memory_ratio']:.3f}",
        "peak MB": f"{r['peak_memory_bytes'] / 1e6:.0f}",
        "time": f"{r['time_ratio']:.3f}",
    }


def _draw_cells(r: dict[str, Any]) -> dict[str, str]:
    cells = {"draws": r["draws"], "passes": ", ".join(str(n) for n in r["passes"].values() if n)}
    for what in ("gathered", "sharded"):
        rate, ratio = r["tokens_per_second"][what], r["ratio_to_generate"][what]
        cells |= {what: "" if rate is None else f"{rate:.0f}", f"{what} x": "" if rate is None else f"{ratio:.2f}"}
    return cells | {
        "generate": f"{r['tokens_per_second']['generate']:.0f}",
        "drawing": f"{r['drawing_share']:.0%}",
        "epoch": f"{r['epoch_time_ratio']:.2f}",
    }


def _plot(found: dict[str, Any], path: Path) -> None:
    """Time by part: of steps as shares of their block's sft, of rounds as shares of an epoch of sft."""
    steps, rounds = found["rows"], found["drawing"]
    shown = [rows for rows in (steps, rounds) if rows]
    figure, axes = plt.subplots(
        len(shown),
        figsize=(8, sum(1 + 0.35 * len(rows) for rows in shown)),
        height_ratios=[2 + len(rows) for rows in shown],
        squeeze=False,
        layout="constrained",
    )
    panels = iter(axes.flat)
    if steps:
        names = [f"{_name(r)} (x{_block(r)[0]}{'' if _block(r)[1] else ', no checkpointing'})" for r in steps]
        panel = next(panels)
        _bars(panel, names, [r["phases_ratio"] for r in steps], "step time, sft = 1")
        panel.axvline(1.25, color="black", linewidth=0.8, linestyle=":")
        panel.text(1.26, -0.7, "a whole forward more, with checkpointing", fontsize=7)
    if rounds:
        shares = [(r["epoch_time_ratio"], r["drawing_share"]) for r in rounds]
        parts = [{"drawing": time * share, "training": time * (1 - share)} for time, share in shares]
        _bars(next(panels), [r["draws"] for r in rounds], parts, "round of one epoch, an epoch of sft = 1")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(panel: Axes, names: list[str], parts: list[dict[str, float]], label: str) -> None:
    for place, widths in enumerate(parts):
        left = 0.0
        for number, (part, width) in enumerate(widths.items()):
            panel.barh(place, width, left=left, color=f"C{number}", label=None if place else part)
            left += width
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel(label)
    panel.legend(fontsize=8)
