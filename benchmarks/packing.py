"""Real tokens per second of padded, length-grouped and packed rows, which take turns step by step on one engine.

    deepspeed --num_accelerators 2 benchmarks/packing.py --config recipes/gsm8k.yaml --data.train FILE

Takes a recipe and overrides as `train` does, keeps nothing of the training, and prints medians and quartiles.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from selfgen_ds.cli import recipe_of
from selfgen_ds.config import Recipe
from selfgen_ds.data.batches import StepBatches
from selfgen_ds.engine.step import train_step
from selfgen_ds.ranks import process_group
from selfgen_ds.setup.inputs import load_data, load_step_batches
from selfgen_ds.setup.prepare import Run, prepare

_STEPS = 8


def main() -> None:
    recipe, overrides = recipe_of(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, output_dir=folder, data=replace(recipe.data, packing=True))
        run = prepare(recipe, overrides | {"output_dir", "data.packing"})
        rates, shares = measure(run, variants_of(recipe, run))
        if dist.get_rank() == 0:
            show(rates, shares)
        dist.barrier()
    process_group.leave_process_group()


def variants_of(recipe: Recipe, run: Run) -> dict[str, StepBatches]:
    """Return the batches of the same samples, padded, grouped by length and packed."""
    samples = load_data(recipe, run.tokenizer)
    shape: dict[str, Any] = {
        "step_size": run.step_batches.step_size,
        "micro_batch_size": recipe.train.micro_batch_size,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "epochs": None,
    }
    variants = {}
    for name in ("padded", "group_by_length", "packing"):
        data = replace(recipe.data, packing=name == "packing", group_by_length=name == "group_by_length")
        variants[name] = load_step_batches(replace(recipe, data=data), samples, **shape)
    return variants


def measure(run: Run, variants: dict[str, StepBatches]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return, by variant and step, the real tokens per second and the share of positions that hold a real token."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    shares: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(1 + _STEPS):
        for name, step_batches in variants.items():
            batches = step_batches.at(step)
            dist.barrier()
            started = time.perf_counter()
            result = train_step(run.engine, run.method.contexts(batches, run.policy, run.total_steps - 1), 0.0)
            if step:  # the first step also fills caches
                rates[name].append(result.tokens / (time.perf_counter() - started))
                ids = torch.cat([batch.sample_ids.flatten() for batch in batches])
                shares[name].append(float((ids >= 0).float().mean()))
    return rates, shares


def show(rates: dict[str, list[float]], shares: dict[str, list[float]]) -> None:
    """Print a line per variant."""
    for name, values in rates.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        ratio = median / np.median(rates["padded"])
        print(
            f"{name:16} {median:8.0f} real tokens/s [{low:.0f}, {high:.0f}], {ratio:.2f} x padded, "
            f"{np.mean(shares[name]):.1%} of the positions used"
        )


if __name__ == "__main__":
    main()
