"""`selfgen-ds probe`: a few steps of a recipe that save nothing, and what they cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch.distributed as dist

from selfgen_ds.config import Recipe
from selfgen_ds.data.prefetch import Prefetch
from selfgen_ds.engine.flops import step_flops
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.watch import Watch
from selfgen_ds.setup.prepare import Run, prepare
from selfgen_ds.train import batches_of, take_step


def probe(recipe: Recipe, overrides: set[str], steps: int) -> None:
    """Take some steps of a recipe, and print on rank 0 what they cost, as one line of JSON.

    The steps are spread over the run, so that their p is that of a schedule at many places; of a method with rounds,
    they are the first ones. The rounds that are drawn, and what every run writes at its start, go into a folder beside
    `output_dir`, which is removed. Collective: every rank must call this.

    Args:
        overrides: Settings that were given on the command line.
        steps: Steps to take; 0 to load and check everything only.

    Raises:
        InputError: Bad input or configuration.
    """
    recipe = replace(recipe, output_dir=f"{recipe.output_dir.rstrip('/')}.probe", resume=None)
    if process_group.local_rank() == 0:  # a probe that was killed has left it; nobody writes before all ranks have met
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    with Watch(recipe.train.stall_seconds, recipe.checkpoint.stall_seconds) as watch:
        run = prepare(recipe, overrides, watch.poll)
        flops = step_flops(recipe, run.engine.module)
        watch.begin(run.engine.module)
        lines: list[dict[str, float]] = []
        prefetch = Prefetch()
        of_rounds = 0.0
        for step in _spread(steps, run):
            batches = prefetch.at(batches_of(run, step), step, more=False)
            lines.append(take_step(run, recipe, step, batches, flops)[0])
            of_rounds += 0.0 if run.rounds is None else flops.of_read * run.rounds.facts(step).read_tokens
    cost: dict[str, Any] = {
        "rows": len(run.step_batches),
        "rows_per_step": run.step_batches.step_size,
        "total_steps": run.total_steps,
        "steps": len(lines),
        "step_flops": sum(line["flops"] for line in lines) - of_rounds,
        "rounds": len({line["round"] for line in lines if "round" in line}),
        "round_flops": of_rounds,
    }
    if lines:
        cost["step_time_s"] = fmean(line["step_time_s"] for line in lines[1:] or lines)
        cost["peak_memory_bytes"] = max(line["peak_memory_bytes"] for line in lines)
    dist.barrier()
    if run.folder.storage.writes:
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    if process_group.rank() == 0:
        print(json.dumps(cost))


def _spread(steps: int, run: Run) -> Sequence[int]:
    """Return the numbers of the steps to take."""
    count = min(steps, run.total_steps)
    if run.rounds is not None:
        return range(count)
    return [(2 * number + 1) * run.total_steps // (2 * count) for number in range(count)]
