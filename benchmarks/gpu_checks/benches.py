"""Run `selfgen-ds bench` in this process, with fewer variants than the command has, and return its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_checks.rows import Report
from selfgen_ds.cli import recipe_of
from selfgen_ds.scaling import bench, drawing, losses
from selfgen_ds.scaling.steps import Block

_BLOCKS = [
    Block(accumulation=1, checkpointing=True, mixtures=((0.0, 1), (0.25, 1), (0.5, 1))),
    Block(accumulation=4, checkpointing=True, mixtures=((0.25, 1),)),
]
"""Without exact mixtures: random weights need many passes for them, which would take minutes."""


def run_bench(report: Report, grid: str, options: list[str]) -> dict[str, Any]:
    """Run `bench` and return `bench.json`.

    Args:
        grid: `budget` for the cost of a step, `rollouts` for that of rounds.
    """
    sizes = report.sizes
    bench.BUDGET = _BLOCKS
    drawing._TURNS = 1
    losses.TOKENS, losses.VOCABULARY = sizes.loss_positions, sizes.loss_vocabulary
    recipe, overrides = recipe_of([*options, "--output_dir", str(report.folder)], "bench")
    bench.bench(recipe, overrides, grid, sizes.bench_steps)
    record: dict[str, Any] = json.loads((Path(recipe.output_dir) / "bench.json").read_text(encoding="utf-8"))
    return record
