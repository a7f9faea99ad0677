"""The tables and the plot of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from selfgen_ds.files import naming


def show(folder: Path, record: dict[str, Any]) -> None:
    """Write `bench.png`, and print the tables."""
    _plot(record, folder / "bench.png")
    console = Console(highlight=False, width=max(150, Console().width))
    steps, losses, rounds = record["rows"], record["losses"], record["drawing"]
    for block in dict.fromkeys(map(_block, steps)):
        accumulation, checkpointing = block
        title = f"steps: accumulation {accumulation}, {'with' if checkpointing else 'without'} activation checkpointing"
        console.print(table(title, [_step_cells(row) for row in steps if _block(row) == block]))
    if steps:
        console.print("time, memory and phases: divided by sft's step time and peak memory")
        console.print("gathers: copies of all parameters per step\n")
    if losses:
        title = f"the loss: {losses[0]['tokens']} targets, {losses[0]['vocabulary']} token ids"
        console.print(table(title, [_loss_cells(row) for row in losses]))
    if rounds:
        console.print(table("rounds of one epoch: answer tokens per second", [_round_cells(row) for row in rounds]))
        console.print("x: rate divided by generate()'s; passes: with gathered, then with sharded weights")
        console.print("drawing: share of the round's time, with gathered weights; epoch: that time / sft's epoch\n")
    console.print(f"written to {folder}/bench.json and bench.png")


def table(title: str, rows: list[dict[str, str]]) -> Table:
    """Return a table of rows that map the columns' names to their cells."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(rows[0]):
        result.add_column(name, justify="right" if number else "left", no_wrap=True)
    for cells in rows:
        result.add_row(*cells.values())
    return result


def _block(row: dict[str, Any]) -> tuple[int, bool]:
    return row["gradient_accumulation_steps"], row["activation_checkpointing"]


def _variant(row: dict[str, Any]) -> str:
    return "sft" if row["variant"] == "sft" else f"p {row['replace_probability']:g}, {row['passes']}"


def _step_cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {
        "p, passes": _variant(row),
        "time": f"{row['step_time_ratio']:.3f}",
        "quartiles": " ".join(f"{ratio:.3f}" for ratio in row["step_time_ratio_quartiles"]),
        "memory": f"{row['peak_memory_ratio']:.3f}",
        "gathers": f"{row['gathers']:.2f}",
        "passes": str(row["passes_made"]),
        "groups": str(row["groups"]),
        **{name: f"{ratio:.2f}" for name, ratio in row["phases_ratio"].items()},
        "step ms": f"{1e3 * row['step_time_s']:.0f}",
        "tokens/s": f"{row['tokens_per_second']:.0f}",
    }
    return cells if row["mfu"] is None else cells | {"MFU": f"{row['mfu']:.1%}"}


def _loss_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "loss": row["loss"],
        "memory": f"{row['peak_memory_ratio']:.3f}",
        "peak MB": f"{row['peak_memory_bytes'] / 1e6:.0f}",
        "time": f"{row['time_ratio']:.3f}",
    }


def _round_cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {"draws": row["draws"], "passes": ", ".join(str(count) for count in row["passes"].values() if count)}
    for weights in ("gathered", "sharded"):
        rate, ratio = row["tokens_per_second"][weights], row["ratio_to_generate"][weights]
        cells[weights] = "" if rate is None else f"{rate:.0f}"
        cells[f"{weights} x"] = "" if rate is None else f"{ratio:.2f}"
    return cells | {
        "generate": f"{row['tokens_per_second']['generate']:.0f}",
        "drawing": f"{row['drawing_share']:.0%}",
        "epoch": f"{row['epoch_time_ratio']:.2f}",
    }


def _plot(record: dict[str, Any], path: Path) -> None:
    """Write a PNG with the time by part: of each step divided by sft's, of each round divided by an epoch of sft."""
    steps, rounds = record["rows"], record["drawing"]
    panels = [rows for rows in (steps, rounds) if rows]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(8, sum(1 + 0.35 * len(rows) for rows in panels)),
        height_ratios=[2 + len(rows) for rows in panels],
        squeeze=False,
        layout="constrained",
    )
    if steps:
        names = [f"{_variant(r)} (x{_block(r)[0]}{'' if _block(r)[1] else ', no checkpointing'})" for r in steps]
        panel = axes[0, 0]
        _plot_bars(panel, names, [row["phases_ratio"] for row in steps], "step time, sft = 1")
        panel.axvline(1.25, color="black", linewidth=0.8, linestyle=":")
        panel.text(1.26, -0.7, "one more forward, with checkpointing", fontsize=7)
    if rounds:
        times = [(row["epoch_time_ratio"], row["drawing_share"]) for row in rounds]
        parts = [{"drawing": time * share, "training": time * (1 - share)} for time, share in times]
        _plot_bars(axes[-1, 0], [row["draws"] for row in rounds], parts, "round of one epoch, an epoch of sft = 1")
    with naming(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_bars(panel: Axes, names: list[str], parts: list[dict[str, float]], label: str) -> None:
    """Draw a horizontal bar per name, made of its parts, with a line at 1."""
    for position, widths in enumerate(parts):
        left = 0.0
        for number, (part, width) in enumerate(widths.items()):
            panel.barh(position, width, left=left, color=f"C{number}", label=None if position else part)
            left += width
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel(label)
    panel.legend(fontsize=8)
